"""A decode step of some layers of V4-Flash with its head, weights as released: milliseconds, and where they go.

Weights and the cache's contents are random; contexts are as long as they are said to be without having been fed. Steps
follow each other through a donated cache, each feeds the token that the one before it chose.
"""

import argparse
import collections
import functools
import glob
import os
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_timing import fact

from dsv4_jax import DSV4Config, build_schedule
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.schema import build_schema
from dsv4_jax.decode.programs import COMPILER_OPTIONS
from dsv4_jax.model.layer_schedule import RouterMode
from dsv4_jax.model.random_weights import random_model

Array = jax.Array
GOALS = {1: 0.8, 64: 4.0}  # milliseconds
# By the innermost of these names in the path of an operation.
GROUPS = {
    "norm": "norms", "streams": "residual streams", "router": "router", "projection": "projections",
    "shared_expert": "projections", "head": "projections", "experts": "experts", "attention": "cache",
    "embedding": "other",
}  # fmt: skip
# By the kernel's name, for those whose operation is not known: a CUDA graph does not say it.
KERNELS = {
    "dsv4::projection|dense_kernel|gemm|nvjet": "projections",
    "dsv4::experts": "experts",
    "hyper_connect|sinkhorn": "residual streams",
    "dsv4::.*(attend|select|score|top_k|_layer|write|append|compress|tail|read)": "cache",
    "route": "router",
}


def flash_slice() -> DSV4Config:
    """Four layers of V4-Flash, one of which routes by token id."""
    return DSV4Config.flash().replace(num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), num_hash_layers=1)


def filled_cache(config: DSV4Config, batch: int, context: int) -> KVCache:
    """A cache in which every request has blocks for a block more than `context` tokens, its contents random."""
    columns = -(-context // config.block_size) + 1
    schemas = tuple(build_schema(config, spec) for spec in build_schedule(config))
    kinds = {schema.kind for schema in schemas if schema.entries_per_block}
    cache = KVCache.allocate(schemas, batch, dict.fromkeys(kinds, batch * columns), dict.fromkeys(kinds, columns))

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache: KVCache) -> KVCache:
        def random(x: Array) -> Array:
            if x.dtype == jnp.int32:
                return x
            place = sum(
                jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(0x9E3779B1 + 2 * axis)
                for axis in range(x.ndim)
            )
            byte = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B) >> 24
            if x.dtype == jnp.uint8:
                return (byte & 0xB7).astype(jnp.uint8)  # no NaN in any format
            return ((byte.astype(jnp.float32) + 1) / 256).astype(x.dtype)

        table = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
        cache = jax.tree.map(random, cache)
        return cache.replace_tables(dict.fromkeys(cache.block_table, table + 0))

    return fill(cache)


def least_bytes(model, cache: KVCache, batch: int, context: int) -> int:
    """What a step must read of weights and cache: of experts and embeddings what `batch` tokens are likely to need."""
    config, total = model.config, 0.0
    for path, value in nnx.to_flat_state(nnx.split(model)[1]):
        name, size = ".".join(map(str, path)), value[...].nbytes
        if ".experts." in name:
            size *= 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
        elif (name == "embed.weight" and not config.tie_word_embeddings) or name.endswith("tid2eid"):
            size *= batch / config.vocab_size
        total += size
    record = cache.state["swa"].ring.nope.shape[-1] + 2 * config.rope_dim + 4
    for spec in build_schedule(config):
        entries = context // spec.compress_ratio if spec.compress_ratio else 0
        if spec.compress_ratio == config.csa_ratio and entries > config.index_topk:
            total += batch * entries * config.index_head_dim * 9 // 16
            entries = config.index_topk
        total += batch * (config.sliding_window + entries) * record
    return round(total)


@functools.cache
def copy_rate() -> float:
    """Bytes a second that a copy reads and writes together."""
    size = 1 << 30 if jax.default_backend() == "gpu" else 1 << 24
    array, copy = jnp.zeros(size, jnp.uint8), jax.jit(jnp.copy)
    times = []
    for _ in range(6):
        jax.block_until_ready(copy(array))
        start = time.perf_counter()
        for _ in range(4):
            out = copy(array)
        out.block_until_ready()
        times.append((time.perf_counter() - start) / 4)
    return 2 * size / min(times)


def program(model, batch: int, context: int, steps: int, unroll: int):
    """A jitted call of `steps` decode steps and its weights: (weights, cache, tokens, at) -> (cache, tokens, at)."""
    graphdef, state = nnx.split(model)
    slots = jnp.arange(batch, dtype=jnp.int32)
    block = model.config.block_size

    def call(state, cache: KVCache, tokens: Array, at: Array):
        model = nnx.merge(graphdef, state)

        def one(carry, _):
            cache, tokens, at = carry
            # Requests differ in where they stand in a window of the compressors.
            plan = StepPlan(slots, context - 1 + (at + 37 * slots) % block)
            logits, cache = model(tokens, cache, plan)
            return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), at + 1), None

        carry = (cache, tokens, at)
        if steps == 1:
            return one(carry, None)[0]
        return jax.lax.scan(one, carry, length=steps, unroll=unroll)[0]

    return jax.jit(call, donate_argnums=(1, 2, 3)), state


def measure(
    model,
    batch: int,
    *,
    context: int,
    steps: int,
    unroll: int = 1,
    repeats: int = 5,
    profile: bool = False,
    concurrent: bool = False,
) -> None:
    """Prints compile time, temporaries and the time of a step; with `profile` also its kernels."""
    name = f"slice, batch {batch}, context {context}, {steps} steps in a call" + ", concurrent" * concurrent
    cache = filled_cache(model.config, batch, context)
    total = least_bytes(model, cache, batch, context)
    call, state = program(model, batch, context, steps, unroll)
    carry = (cache, jnp.arange(batch, dtype=jnp.int32) * 991 % model.config.vocab_size, jnp.int32(0))
    start = time.perf_counter()
    lowered = call.lower(state, *carry)
    fact(f"{name}: trace and lower", time.perf_counter() - start, "s")
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS if concurrent else None)
    fact(f"{name}: compile", time.perf_counter() - start, "s")
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    fact(f"{name}: temporaries", memory.temp_size_in_bytes, "B")
    fact(f"{name}: temporaries, of the weights", memory.temp_size_in_bytes / held * 100, "%")
    carry, took = timed(compiled, state, carry, max(1, 32 // steps), repeats)
    took, goal = took / steps / 1e3, GOALS.get(batch)
    floor = total / copy_rate() * 1e3
    fact(f"{name}: a step" + (f", goal {goal}" if goal else ""), took * 1e3, "us")
    fact(f"{name}: a copy of as many bytes ({total / 1e9:.2f} GB)", floor * 1e3, "us")
    if profile:
        profile_steps(compiled, state, carry, steps, took * 1e3)


def timed(compiled, state, carry, calls: int = 8, repeats: int = 3):
    """The carry after some more calls, and the median time of one in microseconds."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            carry = compiled(state, *carry)
        jax.block_until_ready(carry)
        if repeat:
            times.append((time.perf_counter() - start) / calls * 1e6)
    return carry, statistics.median(times)


def profile_steps(compiled, state, carry, steps: int, took: float) -> None:
    """Prints where the time of a call goes, which has so many steps on all devices together."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(2):
                carry = compiled(state, *carry)
            jax.block_until_ready(carry)
        report_kernels(folder, compiled.as_text(), 2 * steps, took)


def scopes(text: str) -> dict[str, str]:
    """Instructions of a compiled program and the path of the operation that each came from."""
    found = re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = .*?op_name=\"([^\"]*)\"", text, re.MULTILINE)
    return dict(found)


def group_of(path: str) -> str:
    """The part of the model that an operation belongs to."""
    known = [GROUPS[part] for part in re.split(r"[/.]", path) if part in GROUPS]
    return known[-1] if known else "other"


def report_kernels(folder: str, text: str, steps: int, took: float) -> None:
    """Prints time on the device by kernel and by part of the model; gaps are the rest of `took` microseconds."""
    paths = scopes(text)
    data = jax.profiler.ProfileData.from_file(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0])
    events = []
    for plane in data.planes:
        if "/device:GPU" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    events.extend((e.start_ns, e.duration_ns, e.name, dict(e.stats), plane.name) for e in line.events)
    if not events:
        print("profile: no kernels were recorded", flush=True)
        return
    events.sort(key=lambda e: e[0])
    kernels, groups = collections.Counter(), collections.Counter()
    count: collections.Counter = collections.Counter()
    ends: dict[str, float] = {}
    for start, duration, name, stats, device in events:
        end = max(ends.get(device, start), start)
        busy = max(0.0, start + duration - end)  # of kernels of a device that overlap the later has what is left
        ends[device] = max(end, start + duration)
        operation = str(stats.get("hlo_op", ""))
        path = paths.get(operation, "") or next(
            (p for n, p in paths.items() if n.replace(".", "_").replace("-", "_") == name), ""
        )
        plain = re.sub(r"<.*|[(].*", "", name.replace("(anonymous namespace)::", "").removeprefix("void "))
        group = "collectives" if name.startswith("nccl") else group_of(path) if path else "other"
        if group == "other":
            group = next((found for pattern, found in KERNELS.items() if re.search(pattern, plain)), group)
        short = f"{group:17} {plain[:44]:44} {'/'.join(path.split('/')[-3:])[:60]}"
        kernels[short] += busy
        count[short] += 1
        groups[group] += busy
    for group, busy in groups.most_common():
        fact(f"profile: {group}", busy / steps / 1e3, "us a step")
    fact("profile: gaps", took - groups.total() / steps / 1e3, "us a step")
    fact("profile: kernels", len(events) / steps, "a step")
    for short, busy in kernels.most_common(70):
        print(f"  {busy / steps / 1e3:9.2f} us {count[short] / steps:6.1f} x  {short}", flush=True)


def run(options: argparse.Namespace) -> None:
    """All of it."""
    config = DSV4Config.from_hf(options.config) if options.config else flash_slice()
    start = time.perf_counter()
    model = jax.block_until_ready(random_model(config))
    state = jax.tree.leaves(nnx.split(model)[1])
    jax.block_until_ready(state)
    fact("slice: making its weights", time.perf_counter() - start, "s")
    fact("slice: weights", sum(x.nbytes for x in state) / 1e9, "GB")
    hashed = sum(spec.router_mode is RouterMode.HASH for spec in build_schedule(config))
    fact("slice: layers, of these routed by token id", hashed, f"of {config.num_hidden_layers}")
    fact("a copy reads and writes", copy_rate() / 1e12, "TB/s")
    for batch in options.batches:
        for steps in options.steps:
            measure(
                model,
                batch,
                context=options.context,
                steps=steps,
                profile=options.profile and steps == options.steps[0],
                concurrent=options.concurrent,
            )


def main() -> None:
    """On its own: also what a CPU can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    run(parser.parse_args())


def numbers(text: str) -> list[int]:
    """1,64 -> [1, 64]."""
    return [int(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this part alone."""
    parser.add_argument("--config", help="slice: a configuration instead of four layers of V4-Flash")
    parser.add_argument("--batches", type=numbers, default=[1, 64], help="slice: tokens of a step")
    parser.add_argument("--context", type=int, default=4096, help="slice: tokens of a request before the step")
    parser.add_argument("--steps", type=numbers, default=[1, 16], help="slice: steps in a call")
    parser.add_argument("--profile", action="store_true", help="slice: where a step's time goes, by kernel")
    parser.add_argument("--concurrent", action="store_true", help="slice, flash: XLA's CUDA graphs have branches")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
