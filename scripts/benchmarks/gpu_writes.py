"""Rows of the GPU benchmark: append_swa, plain and fused, and the compressors, in decode and prefill."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from gpu_timing import Row, warmed

from dsv4_jax.cache.formats import allocate_keys, record_format
from dsv4_jax.ops.nn.rope import rope_frequencies
from dsv4_jax.ops.segments import Segments, StepTokens, one_token_segments
from dsv4_jax.ops.write.append_swa import SWARing, append_swa
from dsv4_jax.ops.write.append_swa_fused import RawWindow, append_swa_fused
from dsv4_jax.ops.write.compress import CompressorTail, CompressorWeights, Projections, compress, compress_indexer
from dsv4_jax.ops.write.running_tail import RunningTail, running_rows

Array = jax.Array
LANES = {4: 2, 128: 1}  # by ratio
KINDS = {4: "CSA", 128: "HCA"}


def new_ring(layers: int, slots: int, rows: int = 128, form: str = "fp8") -> SWARing:
    """An empty ring."""
    shape = (layers, slots, rows)
    record = record_format(form).allocate(shape, 448, 64)
    return SWARing(*record, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape[:-1], jnp.int32))


def repeated(operation: Callable, layers: int, steps: int, rounds: int = 1):
    """A jitted program of `steps` times `rounds` times all layers: operation(state, layer) -> state, which is donated.

    The rounds are unrolled: an iteration of the loop costs some 22 us on an H200, as much as many small calls.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, operands):
        def step(_, state):
            for _ in range(rounds):
                for layer in range(layers):
                    state = operation(state, layer, operands)
            return state

        return jax.lax.fori_loop(0, steps, step, state)

    return run


def appender(fused: bool, layer: int):
    """append(ring, window, tokens), plain or fused."""
    if fused:
        return functools.partial(append_swa_fused, eps=1e-6, layer=layer)
    return lambda ring, window, tokens: append_swa(
        ring, window.kv, *tokens[:2], layer=layer, one_token_per_slot=tokens.one_per_slot
    )


def append_inputs(tokens: int, dtype, seed: int) -> RawWindow:
    return RawWindow(
        jax.random.normal(jax.random.key(seed), (tokens, 512), dtype), jnp.ones(512),
        jax.random.uniform(jax.random.key(7), (tokens, 32)), jax.random.uniform(jax.random.key(8), (tokens, 32)),
    )  # fmt: skip


def append_prefill(dtype, fused: bool, tokens: int = 65536, layers: int = 8, form: str = "fp8") -> Row:
    inputs = [append_inputs(tokens, dtype, i) for i in range(layers)]
    order = jax.random.permutation(jax.random.key(1), tokens // 128).astype(jnp.int32)
    slots, positions = jnp.repeat(order, 128), jnp.arange(tokens, dtype=jnp.int32) % 128
    run = repeated(lambda r, i, x: appender(fused, i)(r, x[i], StepTokens(slots, positions)), layers, 1)
    record = record_format(form).record_bytes(448, 64)
    return warmed(
        f"append_swa{' fused' * fused}, {tokens} tokens, {jnp.dtype(dtype).name}{(', ' + form) * (form != 'fp8')}",
        lambda r: run(r, inputs),
        new_ring(layers, tokens // 128, form=form),
        per=layers,
        total=tokens * (inputs[0][0].nbytes // tokens + record + 16 + (256 if fused else 0)),
    )


def append_decode(tokens: int, fused: bool, layers: int = 43, rounds: int = 3, steps: int = 3) -> Row:
    inputs = append_inputs(tokens, jnp.bfloat16, 0)
    at = jnp.arange(tokens, dtype=jnp.int32)

    def operation(ring, layer, inputs):
        return appender(fused, layer)(ring, inputs, StepTokens(at, at + 130, one_token_segments(at, at + 130)))

    run = repeated(operation, layers, steps, rounds)
    name = f"append_swa{' fused' * fused}, decode, {tokens} tokens"
    return warmed(name, lambda r: run(r, inputs), new_ring(layers, tokens), per=layers * rounds * steps, target=1.5)


def new_compressor(ratio, dim, layers, slots, blocks, keys, form="fp8", running=False):
    """A pool, tails of random numbers (running sums if `running`) and weights."""
    lanes, pool = LANES[ratio], (layers, blocks, 128 // ratio)
    stored = allocate_keys(keys, pool, dim) if keys else record_format(form).allocate(pool, dim - 64, 64)
    rows = [lanes * ratio - 1] * 2 + ([ratio - 1] * 2 if lanes == 2 else [])
    shapes = [(layers, slots, n, dim) for n in rows]
    tails = [jax.random.normal(jax.random.key(i), s, jnp.float32) for i, s in enumerate(shapes)]
    frequencies = rope_frequencies(64, 160000.0, factor=16.0, original_max_position=65536)
    weights = CompressorWeights(
        jax.random.normal(jax.random.key(9), (ratio, lanes * dim)), jnp.ones(dim), jnp.asarray(frequencies)
    )
    if running:
        sums = jax.random.uniform(jax.random.key(0), (layers, slots, running_rows(0), 5, dim), minval=1.0, maxval=2.0)
        return (stored, RunningTail(sums)), weights
    return (stored, CompressorTail(*[*tails, None, None][:4])), weights


def compressor(keys: str | None, **options):
    options = {"eps": 1e-6, **options}
    return (
        functools.partial(compress_indexer, format=keys, **options) if keys else functools.partial(compress, **options)
    )


def compress_decode(
    ratio, dim, batch, closing, *, keys=None, form="fp8", running=False, target=None, layers=21, rounds=4, steps=3
) -> Row:
    state, weights = new_compressor(ratio, dim, layers, batch, 2 * batch, keys, form, running)
    at = jnp.arange(batch, dtype=jnp.int32)
    positions = jnp.full(batch, 2 * ratio - (1 if closing else 2), jnp.int32)
    table = jnp.arange(2 * batch, dtype=jnp.int32).reshape(batch, 2)
    tokens = StepTokens(at, positions, one_token_segments(at, positions), table)
    shape = (batch, LANES[ratio] * dim)
    kv, gate = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))

    def operation(state, layer, operands):
        return compressor(keys, layer=layer)(*state, Projections(*operands, weights), tokens)

    run = repeated(operation, layers, steps, rounds)
    kind = KINDS[ratio] + " running" * running + (f" indexer {keys}" if keys else "") + (", " + form) * (form != "fp8")
    rows = 5 / 2 if running else 7 if ratio == 4 else 127  # of the tail, k and z, in float32
    again = ", the same layer again and again" * (layers == 1)  # all of it in the L2, and no new pages
    return warmed(
        f"{kind} compress, decode, batch {batch}, {'all' if closing else 'none'} closing{again}",
        lambda s: run(s, (kv, gate)),
        state,
        per=layers * rounds * steps,
        total=round(batch * dim * (2 * 4 * rows + 2 * LANES[ratio] * (2 + 4) + 1)) if closing else None,
        target=target,
    )


def compress_prefill(
    ratio, dim, tokens, dtype, *, keys=None, running=False, target=None, layers=8, per_slot=None
) -> Row:
    per_slot = per_slot or tokens
    slots = tokens // per_slot
    columns = per_slot // 128
    state, weights = new_compressor(ratio, dim, layers, slots, slots * columns, keys, running=running)
    t = jnp.arange(tokens, dtype=jnp.int32)
    at, positions = t // per_slot, t % per_slot
    segments = Segments(
        jnp.arange(slots, dtype=jnp.int32), jnp.zeros(slots, jnp.int32), jnp.full(slots, per_slot, jnp.int32),
        t.reshape(slots, per_slot), t,
    )  # fmt: skip
    table = jnp.arange(slots * columns, dtype=jnp.int32).reshape(slots, columns)
    where = StepTokens(at, positions, segments, table)
    shape = (tokens, LANES[ratio] * dim)
    inputs = [[jax.random.normal(jax.random.key(2 * i + j), shape, dtype) for j in range(2)] for i in range(layers)]

    def operation(state, layer, inputs):
        return compressor(keys, layer=layer)(*state, Projections(*inputs[layer], weights), where)

    run = repeated(operation, layers, 1)
    record = dim // 2 + dim // 16 if keys else 448 + 128 + 4
    kind = KINDS[ratio] + " running" * running + (f" indexer {keys}" if keys else "")
    return warmed(
        f"{kind} compress, prefill {slots} x {per_slot} tokens, {jnp.dtype(dtype).name}",
        lambda s: run(s, inputs),
        state,
        per=layers,
        total=2 * inputs[0][0].nbytes + tokens // ratio * (record + 4 * 64),
        target=target,
    )
