"""Rows of the GPU benchmark: choosing entries by score, beside the least that bytes and arithmetic allow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from gpu_attend import FLOPS, once
from gpu_reads import random_bytes
from gpu_timing import Row, warmed

from dsv4_jax.cache.formats import key_bytes
from dsv4_jax.ops.formats.fp4 import GROUP_SIZE
from dsv4_jax.ops.read.select import select
from dsv4_jax.ops.segments import Segments, StepTokens, one_token_segments
from dsv4_jax.ops.write.compress import IndexerKeys

Array = jax.Array

HEADS, PER_BLOCK, RATIO, LAYERS = 64, 32, 4, 2

# Entries of a request: {batch: goal}, microseconds.
DECODE = {16_384: {1: 8, 16: 20, 64: 60}, 262_144: {1: 25, 16: 190}}
POOL = 16 * 262_144  # keys of a layer


@once
def stored(form: str) -> IndexerKeys:
    """A pool of POOL keys a layer, beyond the L2 cache."""
    pool = LAYERS, POOL // PER_BLOCK, PER_BLOCK
    codes = jax.random.bits(jax.random.key(0), (*pool, 64), jnp.uint8)
    return IndexerKeys(codes, random_bytes(1, *pool, 128 // GROUP_SIZE[form]))


def queries(tokens: int) -> tuple[Array, Array, tuple[Array, Array]]:
    """As the projections give them: q, weights, cos and sin."""
    q = jax.random.normal(jax.random.key(5), (tokens, HEADS, 128), jnp.bfloat16)
    angle = jax.random.uniform(jax.random.key(6), (tokens, 32))
    return q, jax.random.normal(jax.random.key(7), (tokens, HEADS)), (jnp.cos(angle), jnp.sin(angle))


def least(tokens: int, keys_read: int, keys_scored: float, k: int, form: str) -> dict:
    """Bytes that must move for so many keys, q and the result; microseconds of the products."""
    total = keys_read * key_bytes(form, 128) + tokens * (HEADS * (2 * 128 + 4) + 4 * k)
    return {"total": total, "arithmetic": 2 * keys_scored * HEADS * 128 / FLOPS * 1e6}


def decode(form: str, entries: int, batch: int, goal: float | None, k: int = 512) -> Row:
    """One token of every request; each call of the program reads other requests, or another layer."""
    keys, columns = stored(form), entries // PER_BLOCK
    requests = POOL // entries
    table = jax.random.permutation(jax.random.key(3), requests * columns).astype(jnp.int32).reshape(requests, columns)
    calls = max(LAYERS, min(16, LAYERS * requests // batch))
    q, weights, raw = queries(batch)
    positions = jnp.full(batch, RATIO * entries - 1, jnp.int32)

    @jax.jit
    def run(keys, table, q, weights, raw, positions):
        out = []
        for i in range(calls):
            slots = (jnp.arange(batch, dtype=jnp.int32) + i // LAYERS * batch) % requests
            tokens = StepTokens(slots, positions, one_token_segments(slots, positions), table)
            where = {"layer": i % LAYERS, "format": form, "ratio": RATIO, "raw": raw}
            out.append(select(q, weights, tokens, keys, k, **where))
        return out

    return warmed(
        f"select, {k} of {entries} {form} keys, batch {batch}",
        lambda _: run(keys, table, q, weights, raw, positions),
        None,
        per=calls,
        target=goal,
        **least(batch, batch * entries, batch * entries, k, form),
    )


def chunk(form: str, tokens: int, context: int, k: int = 512) -> Row:
    """The last tokens of a prompt of `context`."""
    keys, columns = stored(form), context // RATIO // PER_BLOCK
    table = jax.random.permutation(jax.random.key(3), POOL // PER_BLOCK)[:columns].astype(jnp.int32)[None]
    rows = np.arange(tokens, dtype=np.int32)
    start = np.full(1, context - tokens, np.int32)
    segments = Segments(np.zeros(1, np.int32), start, np.full(1, tokens, np.int32), rows[None], rows)
    positions, slots = start + rows, np.zeros(tokens, np.int32)
    q, weights, raw = queries(tokens)

    @jax.jit
    def run(keys, table, q, weights, raw, slots, positions, segments):
        where = {"format": form, "ratio": RATIO, "raw": raw}
        step = StepTokens(slots, positions, segments, table)
        return [select(q, weights, step, keys, k, layer=i, **where) for i in range(LAYERS)]

    return warmed(
        f"select, {k} of {form} keys, chunk of {tokens} tokens up to {context}",
        lambda _: run(keys, table, q, weights, raw, slots, positions, segments),
        None,
        per=LAYERS,
        **least(tokens, context // RATIO, float(((positions + 1) // RATIO).sum()), k, form),
    )


def rows() -> list[functools.partial[Row]]:
    """All rows, not yet prepared."""
    made = [
        functools.partial(decode, "nvfp4", entries, batch, goal)
        for entries, goals in DECODE.items()
        for batch, goal in goals.items()
    ]
    made.append(functools.partial(decode, "mxfp4", 16_384, 16, None))
    made.append(functools.partial(decode, "nvfp4", 16_384, 16, None, 1024))
    made.extend(functools.partial(chunk, "nvfp4", 2048, context) for context in (32_768, 131_072))
    return made
