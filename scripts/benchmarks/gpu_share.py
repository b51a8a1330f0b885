"""A decode step and a prefill of what one of several devices has of a V4-Flash: all layers, a part of the experts.

Not a whole model: nothing is exchanged with other devices, and the six experts of a token are chosen among those that
are here. With 1 / N of the experts, tokens of one device are as much work for them as N devices' tokens would be.
Weights, cache and contexts as in `gpu_slice`. Programs are compiled side by side.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_slice import copy_rate, filled_cache, least_bytes, numbers, profile_steps, program, report_kernels, timed
from gpu_timing import fact, failed

from dsv4_jax import DSV4Config
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.model.random_weights import random_model
from dsv4_jax.ops.segments import Segments

Array = jax.Array
CHUNK = 2048  # tokens of a prefill step


def flash_share(devices: int, layers: int | None = None) -> DSV4Config:
    """V4-Flash with 1 / devices of its routed experts."""
    config = DSV4Config.flash()
    config = config.replace(n_routed_experts=config.n_routed_experts // devices)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers, compress_ratios=config.compress_ratios[:layers])
    return config


def prefill_program(model):
    """A jitted step of a chunk of one prompt: (weights, cache, tokens, start) -> (cache, the next token)."""
    graphdef, state = nnx.split(model)

    def call(state, cache: KVCache, tokens: Array, start: Array):
        model, count = nnx.merge(graphdef, state), tokens.shape[0]
        each, one = jnp.arange(count, dtype=jnp.int32), jnp.ones((1,), jnp.int32)
        segments = Segments(slots=0 * one, starts=start * one, counts=count * one, tokens=each[None], rows=each)
        plan = StepPlan(jnp.zeros((count,), jnp.int32), start + each, segments)
        hidden, cache = model.hidden(tokens, cache, plan)
        return cache, jnp.argmax(model.logits(hidden[-1:]), axis=-1)

    return jax.jit(call, donate_argnums=1), state


def abstract(tree):
    """Shapes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def decode(model, compiled, batch: int, context: int, profile: bool) -> None:
    """Prints the time of a step."""
    name = f"share, batch {batch}, context {context}"
    cache = filled_cache(model.config, batch, context)
    total = least_bytes(model, cache, batch, context)
    state = nnx.split(model)[1]
    carry = (cache, jnp.arange(batch, dtype=jnp.int32) * 991 % model.config.vocab_size, jnp.int32(0))
    carry, took = timed(compiled, state, carry)
    fact(f"{name}: a step", took, "us")
    fact(f"{name}: a copy of as many bytes ({total / 1e9:.2f} GB)", total / copy_rate() * 1e6, "us")
    fact(f"{name}: cache", sum(x.nbytes for x in jax.tree.leaves(carry[0])) / 1e9, "GB")
    fact(f"{name}: temporaries", compiled.memory_analysis().temp_size_in_bytes / 1e6, "MB")
    stats = jax.local_devices()[0].memory_stats() or {}
    fact(f"{name}: most bytes on the device so far", stats.get("peak_bytes_in_use", 0) / 1e9, "GB")
    if profile:
        profile_steps(compiled, state, carry, 1, took)


def prefill(model, compiled, prompt: int, chunk: int, profile: bool) -> None:
    """Prints the time of a prompt fed in chunks."""
    cache, state = filled_cache(model.config, 1, prompt), nnx.split(model)[1]

    def feed(cache, seed: int):
        for first in range(0, prompt, chunk):
            tokens = (jnp.arange(chunk, dtype=jnp.int32) * 991 + 17 * seed) % model.config.vocab_size
            cache, last = compiled(state, cache, tokens, jnp.int32(first))
        last.block_until_ready()
        return cache

    times = []
    for repeat in range(3):
        start = time.perf_counter()
        cache = feed(cache, repeat)
        if repeat:
            times.append((time.perf_counter() - start) * 1e3)
    name = f"share, prefill of {prompt} tokens in chunks of {chunk}"
    fact(name, min(times), "ms")
    fact(f"{name}: temporaries", compiled.memory_analysis().temp_size_in_bytes / 1e6, "MB")
    if profile:
        chunks = prompt // chunk
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                feed(cache, 3)
            report_kernels(folder, compiled.as_text(), chunks, min(times) / chunks * 1e3)


def run(options: argparse.Namespace) -> None:
    """All of it."""
    config = flash_share(options.devices, options.layers)
    start = time.perf_counter()
    model = random_model(config)
    state = jax.block_until_ready(nnx.split(model)[1])
    fact("share: making its weights", time.perf_counter() - start, "s")
    fact("share: weights", sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9, "GB")
    fact("share: layers", config.num_hidden_layers, f"with {config.n_routed_experts} experts each")
    fact("a copy reads and writes", copy_rate() / 1e12, "TB/s")

    def compiled(kind: str, batch: int, context: int):
        start = time.perf_counter()
        if kind == "decode":
            cache = jax.eval_shape(lambda: filled_cache(config, batch, context))
            call, weights = program(model, batch, context, 1, 1)
            rest: tuple = (jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
        else:
            cache = jax.eval_shape(lambda: filled_cache(config, 1, context))
            call, weights = prefill_program(model)
            rest = (jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
        lowered = call.lower(abstract(weights), abstract(cache), *rest)
        traced = time.perf_counter()
        result = lowered.compile()
        return result, traced - start, time.perf_counter() - traced

    wanted = [("decode", batch, context) for batch in options.share_batches for context in options.contexts]
    wanted.append(("prefill", CHUNK, options.prompt))
    start = time.perf_counter()
    first = compiled(*wanted[0])  # alone: what one program takes
    with ThreadPoolExecutor(8) as pool:
        programs = [pool.submit(lambda: first), *(pool.submit(compiled, *one) for one in wanted[1:])]
    fact("share: compiling all of them side by side", time.perf_counter() - start, "s")
    for (kind, batch, context), future in zip(wanted, programs, strict=True):
        name = f"share, {kind} {batch}, context {context}"
        try:
            result, traced, took = future.result()
            fact(f"{name}: trace and lower", traced, "s")
            fact(f"{name}: compile", took, "s")
            if kind == "prefill":
                prefill(model, result, context, batch, options.profile)
            else:
                decode(model, result, batch, context, options.profile and context == options.contexts[0])
        except Exception as error:
            failed(name, error)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part alone."""
    parser.add_argument("--devices", type=int, default=2, help="share: of so many devices' experts one device's")
    parser.add_argument("--layers", type=int, help="share: the first so many layers")
    parser.add_argument("--contexts", type=numbers, default=[8192, 65536], help="share: tokens of a request")
    parser.add_argument("--share-batches", type=numbers, default=[1, 16, 64, 128], help="share: tokens of a step")
    parser.add_argument("--prompt", type=int, default=8192, help="share: tokens of the prompt")
