"""A whole V4-Flash over all GPUs: decode steps, and a loop that serves long prompts. Random weights as released.

Every device has its share of the requests, of the experts, and a copy of all other weights; with --model-devices so
many have the same requests and divide the weights of heads. The batch is that of all devices together; a device
without a request runs padding. Contents of the caches as in `gpu_slice`.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu_slice import copy_rate, filled_cache, profile_steps, timed
from gpu_timing import fact, failed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import DecodeLoop, DSV4Config, KVCacheManager, ShardedKVCacheManager
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.sharding import cache_specs
from dsv4_jax.decode.programs import COMPILER_OPTIONS
from dsv4_jax.model.random_weights import random_model

Array = jax.Array
OWN, WHOLE = PartitionSpec("data"), PartitionSpec()


def sharded_cache(config: DSV4Config, mesh: Mesh, batch: int, context: int):
    """What makes a cache over the mesh, `batch` requests a device."""
    one = jax.eval_shape(lambda: filled_cache(config, batch, context))
    fill = jax.shard_map(
        lambda: filled_cache(config, batch, context),
        mesh=mesh,
        in_specs=(),
        out_specs=cache_specs(one),
        check_vma=False,
    )
    return jax.jit(fill)


def decode_program(model, mesh: Mesh, specs, requests: int, context: int, steps: int):
    """Jitted decode steps: (weights, cache, tokens, at) -> (cache, tokens, at). Requests of all devices."""
    graphdef, _ = nnx.split(model)
    block = model.config.block_size

    def local(state, cache: KVCache, tokens: Array, at: Array):
        model, here = nnx.merge(graphdef, state), tokens.shape[0]
        slots = jnp.arange(here, dtype=jnp.int32)
        number = jax.lax.axis_index("data") * here + slots

        def step(carry, _):
            cache, tokens, at = carry
            # Requests differ in where they stand in a window of the compressors.
            plan = StepPlan(jnp.where(number < requests, slots, -1), context - 1 + (at + 37 * number) % block)
            logits, cache = model(tokens, cache, plan)
            return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), at + 1), None

        return jax.lax.scan(step, (cache, tokens, at), length=steps)[0]

    caches = cache_specs(
        jax.eval_shape(lambda: filled_cache(model.config, -(-requests // mesh.shape["data"]), context))
    )
    inside = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, caches, OWN, WHOLE), out_specs=(caches, OWN, WHOLE), check_vma=False
    )
    return jax.jit(inside, donate_argnums=(1, 2, 3))


def abstract(tree):
    """Shapes and places instead of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def decode(model, mesh: Mesh, compiled, requests: int, context: int, steps: int, profile: bool) -> None:
    """Prints the time of a step."""
    name = f"flash on {mesh.size} devices, batch {requests}, context {context}, {steps} steps in a call"
    shards = mesh.shape["data"]
    here = -(-requests // shards)
    tokens = jnp.arange(shards * here, dtype=jnp.int32) * 991 % model.config.vocab_size
    cache = sharded_cache(model.config, mesh, here, context)()
    tokens = jax.device_put(tokens, NamedSharding(mesh, OWN))
    carry = cache, tokens, jax.device_put(jnp.int32(0), NamedSharding(mesh, WHOLE))
    del cache
    state = nnx.split(model)[1]
    carry, took = timed(compiled, state, carry, max(1, 16 // steps))
    took /= steps
    fact(f"{name}: a step", took, "us")
    fact(f"{name}: tokens", requests / took * 1e6, "a second")
    fact(f"{name}: temporaries", compiled.memory_analysis().temp_size_in_bytes / 1e6, "MB")
    stats = jax.local_devices()[0].memory_stats() or {}
    fact(f"{name}: most bytes on a device so far", stats.get("peak_bytes_in_use", 0) / 1e9, "GB")
    if profile:
        profile_steps(compiled, state, carry, mesh.size * steps, took)


def serve(model, mesh: Mesh, options: argparse.Namespace) -> None:
    """Prints what a loop serves: random prompts, all submitted at once."""
    config, prompt, new, shards = model.config, options.prompt, options.new_tokens, mesh.shape["data"]
    slots = -(-max(options.concurrency) // shards)
    manager = ShardedKVCacheManager.over(
        mesh,
        lambda: KVCacheManager.create(
            config.geometry, max_concurrent_requests=slots, max_context_len=prompt + new + 64, cache_dtype="fp8"
        ),
    )
    loop = DecodeLoop(model, manager, prefill_chunk=options.chunk, decode_chunk=16)
    rng = np.random.default_rng(0)

    def run(requests: int, new: int) -> float:
        for _ in range(requests):
            loop.submit(rng.integers(0, config.vocab_size, prompt).tolist(), new)
        start = time.perf_counter()
        tokens = sum(len(event.tokens) for event in loop)
        assert tokens == requests * new, (tokens, requests, new)
        return time.perf_counter() - start

    fact("flash, loop: compiling, with a request a shard", run(shards, 40), "s")
    fact(f"flash, loop: a prompt of {prompt} tokens on each shard and one new token", run(shards, 1), "s")
    for requests in options.concurrency:
        took = run(requests, new)
        name = f"flash, loop: {requests} prompts of {prompt} and {new} new tokens"
        fact(name, took, "s")
        fact(f"{name}: tokens of a device, in and out", requests * (prompt + new) / took / mesh.size, "a second")
        fact(f"{name}: tokens of a device, out", requests * new / took / mesh.size, "a second")


def run(options: argparse.Namespace) -> None:
    """All of it."""
    config = DSV4Config.flash()
    if options.layers is not None:
        layers = options.layers
        config = config.replace(num_hidden_layers=layers, compress_ratios=config.compress_ratios[:layers])
    if options.small:
        config = config.replace(
            hidden_size=512,
            moe_intermediate_size=512,
            n_routed_experts=8,
            vocab_size=1024,
            max_position_embeddings=4096,
        )
    mesh = Mesh(np.array(jax.devices()).reshape(-1, options.model_devices), ("data", "model"))
    start = time.perf_counter()
    model = random_model(config, mesh=mesh)
    state = jax.block_until_ready(nnx.split(model)[1])
    fact("flash: making its weights", time.perf_counter() - start, "s")
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    fact(f"flash: weights on each of {mesh.size} devices", held / 1e9, "GB")
    fact("a copy reads and writes", copy_rate() / 1e12, "TB/s")
    specs = jax.tree.map(lambda x: x.sharding.spec, state)

    def compiled(requests: int, context: int):
        shards = mesh.shape["data"]
        here = -(-requests // shards)
        start = time.perf_counter()
        cache = jax.eval_shape(sharded_cache(config, mesh, here, context))
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(cache))
        cache = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, places)
        tokens = jax.ShapeDtypeStruct((shards * here,), jnp.int32, sharding=NamedSharding(mesh, OWN))
        at = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, WHOLE))
        call = decode_program(model, mesh, specs, requests, context, options.flash_steps)
        result = call.lower(abstract(state), cache, tokens, at).compile(
            COMPILER_OPTIONS if options.concurrent else None
        )
        return result, time.perf_counter() - start

    wanted = [(batch, context) for context in options.contexts for batch in options.flash_batches]
    with ThreadPoolExecutor(8) as pool:
        programs = [pool.submit(compiled, *one) for one in wanted]
    for (batch, context), future in zip(wanted, programs, strict=True):
        try:
            result, took = future.result()
            fact(f"flash, batch {batch}, context {context}: tracing and compiling, all side by side", took, "s")
            profile = options.profile and context == options.contexts[0]
            decode(model, mesh, result, batch, context, options.flash_steps, profile)
        except Exception as error:
            failed(f"flash, batch {batch}, context {context}", error)
    del programs
    if not options.concurrency:
        return
    try:
        serve(model, mesh, options)
    except Exception as error:
        failed("flash, loop", error)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part alone."""
    whole = {"type": int, "nargs": "+"}
    parser.add_argument("--flash-batches", **whole, default=[1, 16, 64, 128], help="flash: requests of a step")
    parser.add_argument("--model-devices", type=int, default=1, help="flash: devices that divide a request's heads")
    parser.add_argument("--flash-steps", type=int, default=16, help="flash: decode steps in a call")
    parser.add_argument(
        "--concurrency", type=int, nargs="*", default=[16, 64], help="flash: prompts of a run of the loop"
    )
    parser.add_argument("--new-tokens", type=int, default=1024, help="flash: of each prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="flash: tokens of a prefill step")
    parser.add_argument("--small", action="store_true", help="flash: narrow layers, to try it anywhere")
