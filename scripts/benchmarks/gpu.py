"""What a step writes to the cache, on an NVIDIA GPU: the time of every native operation beside a copy of as many bytes.

Medians after a warm-up, random data, other arrays for every layer, together larger than the L2 cache where a bandwidth
is given. Small calls are timed many to a jitted program, which XLA replays as a CUDA graph; host time is included.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.ops.append_swa import SWARing, append_swa
from dsv4_jax.ops.append_swa_fused import append_swa_fused
from dsv4_jax.ops.compress import CompressorTail, CompressorWeights, IndexerKeys, compress, compress_indexer
from dsv4_jax.ops.record import Record
from dsv4_jax.ops.rope import rope_frequencies
from dsv4_jax.ops.segments import Segments, one_token_segments

Array = jax.Array
RESULTS: list[dict] = []
LANES = {4: 2, 128: 1}  # by ratio


def median_microseconds(call: Callable[[Any], Any], state: Any, *, calls: int = 5, repeats: int = 7) -> float:
    """Median over repeats of the time of one call, several in flight, after warm-up."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(calls):
            state = call(state)
        jax.block_until_ready(state)
        if repeat >= 2:
            times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


@functools.cache
def copy_microseconds(total: int) -> float:
    """Time of a device-to-device copy that reads and writes `total` bytes together; arrays together beyond the L2."""
    count = max(4, min(64, -(-(256 << 20) // max(total, 1))))
    arrays = [jax.random.bits(jax.random.key(i), (max(total // 8, 1),), jnp.uint32) for i in range(count)]
    step = jax.jit(lambda arrays: [jnp.copy(a) for a in arrays])
    return median_microseconds(lambda _: step(arrays), None) / count


def report(name: str, took: float, *, total: int | None = None, target: float | None = None) -> None:
    """Prints and keeps one row; total: the least bytes that must move."""
    row = {"name": name, "us": took, "target_us": target}
    text = f"{name:58} {took:8.2f} us"
    if target is not None:
        text += f"  target {target:6.1f}"
    if total is not None:
        floor = copy_microseconds(total)
        row |= {"bytes": total, "copy_us": floor, "of_copy": floor / took, "TB_per_s": total / took / 1e6}
        text += f"  copy {floor:7.2f}  {floor / took:4.0%}  {total / took / 1e6:5.2f} TB/s"
    RESULTS.append(row)
    print(text, flush=True)


def attempt(benchmark: Callable[..., None], *args: Any, **options: Any) -> None:
    """One failing row does not lose the others."""
    try:
        benchmark(*args, **options)
    except Exception as error:
        name = f"{benchmark.__name__}{args}"
        RESULTS.append({"name": name, "error": str(error)[:500]})
        print(f"{name}: FAILED: {str(error)[:300]}", flush=True)


def new_ring(layers: int, slots: int, rows: int = 128) -> SWARing:
    shape = (layers, slots, rows)
    return SWARing(
        jnp.zeros((*shape, 448), jnp.uint8), jnp.zeros((*shape, 64), jnp.bfloat16), jnp.zeros(shape, jnp.float32),
        jnp.full(shape, -1, jnp.int32), jnp.zeros(shape[:-1], jnp.int32),
    )  # fmt: skip


def repeated(operation: Callable, layers: int, steps: int):
    """A jitted program of `steps` times all layers: operation(state, layer) -> state; the state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, operands):
        def step(_, state):
            for layer in range(layers):
                state = operation(state, layer, operands)
            return state

        return jax.lax.fori_loop(0, steps, step, state)

    return run


def appender(fused: bool, **options):
    """append(ring, (kv, norm, cos, sin), slots, positions), plain or fused."""
    options = {"implementation": "cuda", **options}
    if fused:
        return lambda ring, inputs, *where: append_swa_fused(ring, *inputs, *where, eps=1e-6, **options)
    return lambda ring, inputs, *where: append_swa(ring, inputs[0], *where, **options)


def append_inputs(tokens: int, dtype, seed: int):
    return (
        jax.random.normal(jax.random.key(seed), (tokens, 512), dtype), jnp.ones(512),
        jax.random.uniform(jax.random.key(7), (tokens, 32)), jax.random.uniform(jax.random.key(8), (tokens, 32)),
    )  # fmt: skip


def append_prefill(dtype, fused: bool, tokens: int = 65536, layers: int = 8) -> None:
    inputs = [append_inputs(tokens, dtype, i) for i in range(layers)]
    order = jax.random.permutation(jax.random.key(1), tokens // 128).astype(jnp.int32)
    slots, positions = jnp.repeat(order, 128), jnp.arange(tokens, dtype=jnp.int32) % 128
    run = repeated(lambda r, i, x: appender(fused, layer=i)(r, x[i], slots, positions), layers, 1)
    took = median_microseconds(lambda r: run(r, inputs), new_ring(layers, tokens // 128)) / layers
    total = tokens * (inputs[0][0].nbytes // tokens + 448 + 128 + 8 + 12 + (256 if fused else 0))
    report(f"append_swa{' fused' * fused}, {tokens} tokens, {jnp.dtype(dtype).name}", took, total=total)


def append_decode(tokens: int, fused: bool, layers: int = 43, steps: int = 8) -> None:
    inputs = append_inputs(tokens, jnp.bfloat16, 0)
    at = jnp.arange(tokens, dtype=jnp.int32)

    def operation(ring, layer, inputs):
        return appender(fused, layer=layer, one_token_per_slot=True)(ring, inputs, at, at + 130)

    run = repeated(operation, layers, steps)
    took = median_microseconds(lambda r: run(r, inputs), new_ring(layers, tokens)) / (layers * steps)
    report(f"append_swa{' fused' * fused}, decode, {tokens} tokens", took, target=1.5)


def new_compressor(ratio: int, dim: int, layers: int, slots: int, blocks: int, keys: str | None):
    """A pool, tails of random numbers and weights."""
    lanes, per_block = LANES[ratio], 128 // ratio
    pool = (layers, blocks, per_block)
    if keys:
        group = {"nvfp4": 16, "mxfp4": 32}[keys]
        stored = IndexerKeys(jnp.zeros((*pool, dim // 2), jnp.uint8), jnp.zeros((*pool, dim // group), jnp.uint8))
    else:
        stored = Record(
            jnp.zeros((*pool, dim - 64), jnp.uint8), jnp.zeros((*pool, 64), jnp.bfloat16), jnp.zeros(pool, jnp.float32)
        )
    rows = [lanes * ratio - 1] * 2 + ([ratio - 1] * 2 if lanes == 2 else [])
    shapes = [(layers, slots, n, dim) for n in rows]
    tails = [jax.random.normal(jax.random.key(i), s, jnp.float32) for i, s in enumerate(shapes)]
    frequencies = rope_frequencies(64, 160000.0, factor=16.0, original_max_position=65536)
    weights = CompressorWeights(
        jax.random.normal(jax.random.key(9), (ratio, lanes * dim)), jnp.ones(dim), jnp.asarray(frequencies)
    )
    return (stored, CompressorTail(*[*tails, None, None][:4])), weights


def compressor(keys: str | None, **options):
    options = {"eps": 1e-6, "implementation": "cuda", **options}
    return (
        functools.partial(compress_indexer, format=keys, **options) if keys else functools.partial(compress, **options)
    )


def compress_decode(ratio, dim, batch, closing, *, keys=None, target=None, layers=21, steps=8) -> None:
    state, weights = new_compressor(ratio, dim, layers, batch, 2 * batch, keys)
    at = jnp.arange(batch, dtype=jnp.int32)
    positions = jnp.full(batch, 2 * ratio - (1 if closing else 2), jnp.int32)
    table = jnp.arange(2 * batch, dtype=jnp.int32).reshape(batch, 2)
    segments = one_token_segments(at, positions)
    shape = (batch, LANES[ratio] * dim)
    kv, gate = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))

    def operation(state, layer, operands):
        return compressor(keys, layer=layer)(*state, *operands, weights, at, positions, segments, table)

    run = repeated(operation, layers, steps)
    took = median_microseconds(lambda s: run(s, (kv, gate)), state) / (layers * steps)
    kind = {4: "CSA", 128: "HCA"}[ratio] + (f" indexer {keys}" if keys else "")
    rows = 7 if ratio == 4 else 127  # of the tail, k and z, in float32
    total = batch * dim * (2 * 4 * rows + 2 * LANES[ratio] * (2 + 4) + 1) if closing else None
    report(
        f"{kind} compress, decode, batch {batch}, {'all' if closing else 'none'} closing",
        took,
        total=total,
        target=target,
    )


def compress_prefill(ratio, dim, tokens, dtype, *, keys=None, target=None, layers=8, per_slot=None) -> None:
    per_slot = per_slot or tokens
    slots = tokens // per_slot
    columns = per_slot // 128
    state, weights = new_compressor(ratio, dim, layers, slots, slots * columns, keys)
    t = jnp.arange(tokens, dtype=jnp.int32)
    at, positions = t // per_slot, t % per_slot
    segments = Segments(
        jnp.arange(slots, dtype=jnp.int32), jnp.zeros(slots, jnp.int32), jnp.full(slots, per_slot, jnp.int32),
        t.reshape(slots, per_slot), t,
    )  # fmt: skip
    table = jnp.arange(slots * columns, dtype=jnp.int32).reshape(slots, columns)
    shape = (tokens, LANES[ratio] * dim)
    inputs = [[jax.random.normal(jax.random.key(2 * i + j), shape, dtype) for j in range(2)] for i in range(layers)]

    def operation(state, layer, inputs):
        return compressor(keys, layer=layer)(*state, *inputs[layer], weights, at, positions, segments, table)

    run = repeated(operation, layers, 1)
    took = median_microseconds(lambda s: run(s, inputs), state) / layers
    record = dim // 2 + dim // 16 if keys else 448 + 128 + 4
    kind = {4: "CSA", 128: "HCA"}[ratio] + (f" indexer {keys}" if keys else "")
    total = 2 * inputs[0][0].nbytes + tokens // ratio * (record + 4 * 64)
    report(
        f"{kind} compress, prefill {slots} x {per_slot} tokens, {jnp.dtype(dtype).name}",
        took,
        total=total,
        target=target,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu_results"), help="folder of the JSON file")
    options = parser.parse_args()
    f32, bf16 = jnp.float32, jnp.bfloat16
    for fused in (False, True):
        for dtype in (bf16, f32):
            attempt(append_prefill, dtype, fused)
        for tokens in (1, 64, 256):
            attempt(append_decode, tokens, fused)
    for batch, target in ((64, 2.5), (256, 4.0)):
        attempt(compress_decode, 4, 512, batch, True, target=target)
    attempt(compress_decode, 4, 512, 64, False, target=1.5)
    attempt(compress_decode, 128, 512, 64, True, target=13.0, layers=20)
    attempt(compress_decode, 128, 512, 64, False, target=1.5, layers=20)
    for batch in (64, 256):
        attempt(compress_decode, 4, 128, batch, True, keys="nvfp4")
    attempt(compress_decode, 4, 128, 64, False, keys="nvfp4")
    for dtype in (f32, bf16):
        attempt(compress_prefill, 4, 512, 8192, dtype, target=22.0)
        attempt(compress_prefill, 128, 512, 8192, dtype)
        attempt(compress_prefill, 4, 128, 8192, dtype, keys="nvfp4", layers=16)
    attempt(compress_prefill, 4, 512, 8192, f32, per_slot=128)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {"device": driver, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    (out / "gpu.json").write_text(json.dumps({**about, "rows": RESULTS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
