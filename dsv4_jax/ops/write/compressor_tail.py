"""The full tail of a compressor: the rows of every token that waits to be compressed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..segments import Segments, StepTokens, to_segments
from .append_swa import resolve_writes
from .ordering import after
from .rows import set_rows

Array = jax.Array


class CompressorTail(NamedTuple):
    """Tokens not compressed yet, and what the overlap needs of those that are; row = position mod rows, all float32.

    L layers, R slots, d channels of one lane. A row holds the token's wkv output (k) or its wgate output plus ape (z).
    """

    ka: Array  # (L, R, ratio - 1 or 2 * ratio - 1 with overlap, d)
    za: Array  # as ka
    kb: Array | None  # (L, R, ratio - 1, d), None without overlap
    zb: Array | None  # as kb


class ClosedWindows(NamedTuple):
    """The windows that close in a step; M = S * (most windows one segment can close)."""

    pooled: Array  # (M, d) float32
    slots: Array  # (M,) int32, -1 where nothing closes
    entries: Array  # (M,) int32, index of the entry within its request


def _rows_up_to(old: Array, fresh: Array, layer: int | Array, segments: Segments, reach: int) -> Array:
    """The `reach` rows before each segment from the tail old (L, R, rows, d), then its own fresh (S, C, d)."""
    past = segments.starts[:, None] - reach + jnp.arange(reach, dtype=jnp.int32)[None]
    slots = jnp.maximum(segments.slots, 0)[:, None]
    before = old.at[layer, slots, past % old.shape[2]].get(mode="clip")
    return jnp.concatenate([before, fresh], axis=1)


def closing_positions(segments: Segments, ratio: int) -> tuple[Array, Array]:
    """Last position of every window that a segment may close, (S, most) int32, and whether it closes it."""
    most = (segments.tokens.shape[1] - 1) // ratio + 1
    starts = segments.starts[:, None]
    last = (starts // ratio + 1 + jnp.arange(most, dtype=jnp.int32)[None]) * ratio - 1
    # A difference, because the end of a segment may be one more than int32 holds.
    return last, (last - starts < segments.counts[:, None]) & (segments.slots >= 0)[:, None]


def closed_windows(pooled: Array, last: Array, closes: Array, segments: Segments, ratio: int) -> ClosedWindows:
    """pooled (S, most, d) at the closing positions `last`, where `closes`."""
    slots = jnp.where(closes, segments.slots[:, None], -1).reshape(-1)
    return ClosedWindows(pooled.reshape(-1, pooled.shape[-1]), slots, (last // ratio).reshape(-1))


def _pool(
    tail: CompressorTail, kv: Array, gate: Array, layer: int | Array, segments: Segments, ratio: int
) -> ClosedWindows:
    d = tail.ka.shape[-1]
    starts = segments.starts[:, None]
    last, closes = closing_positions(segments, ratio)

    def window(old: Array, fresh: Array, lag: int) -> Array:
        """(S, most, ratio, d): the rows of the window that ends `lag` tokens before each closing position."""
        reach = ratio - 1 + lag
        rows = _rows_up_to(old, fresh, layer, segments, reach)
        index = (last - starts)[..., None] + reach - lag - ratio + 1 + jnp.arange(ratio, dtype=jnp.int32)[None, None]
        index = jnp.clip(index, 0, rows.shape[1] - 1)
        return rows[jnp.arange(rows.shape[0])[:, None, None], index]

    def pooled() -> Array:
        if tail.kb is None or tail.zb is None:
            k, z = window(tail.ka, kv, 0), window(tail.za, gate, 0)
        else:
            # Window 0 has no predecessor: its lane-a rows weigh exactly nothing, whatever the tail holds there.
            exists = (last >= ratio)[..., None, None]
            ka = jnp.where(exists, window(tail.ka, kv[..., :d], ratio), 0.0)
            za = jnp.where(exists, window(tail.za, gate[..., :d], ratio), -jnp.inf)
            k = jnp.concatenate([ka, window(tail.kb, kv[..., d:], 0)], axis=2)
            z = jnp.concatenate([za, window(tail.zb, gate[..., d:], 0)], axis=2)
        weight = jnp.exp(z - jnp.max(z, axis=2, keepdims=True))
        return jnp.sum(weight * k, axis=2) / jnp.sum(weight, axis=2)

    if ratio > segments.tokens.shape[1]:
        # Most steps close no long window; then its rows (512 KiB a request in HCA) are not read at all.
        values = jax.lax.cond(jnp.any(closes), pooled, lambda: jnp.zeros((*closes.shape, d), jnp.float32))
    else:
        values = pooled()
    return closed_windows(values, last, closes, segments, ratio)


def _store_tail(
    tail: CompressorTail, kv: Array, gate: Array, layer: int | Array, tokens: StepTokens, read: Array
) -> CompressorTail:
    """Tail with the step's tokens written; kv, gate (T, lanes * d); `read` is what had to be read before."""
    d = tail.ka.shape[-1]
    slots, positions = tokens[:2]

    def store(rows: Array, values: Array) -> Array:
        roles = resolve_writes(slots, positions, rows.shape[1], rows.shape[2], tokens.one_per_slot)
        target = after(jnp.where(roles > 0, slots, -1), read)
        return set_rows(rows, (layer, target, positions % rows.shape[2]), values)

    return CompressorTail(
        ka=store(tail.ka, kv[:, :d]),
        za=store(tail.za, gate[:, :d]),
        kb=None if tail.kb is None else store(tail.kb, kv[:, d:]),
        zb=None if tail.zb is None else store(tail.zb, gate[:, d:]),
    )


def take_tokens(
    tail: CompressorTail, kv: Array, gate: Array, layer: int | Array, tokens: StepTokens, ratio: int
) -> tuple[ClosedWindows, CompressorTail]:
    """Windows that the step's tokens close, and the tail with the tokens; kv, gate (T, lanes * d) float32 with ape."""
    segments = tokens.grouped
    closed = _pool(tail, to_segments(kv, segments), to_segments(gate, segments), layer, segments, ratio)
    return closed, _store_tail(tail, kv, gate, layer, tokens, closed.pooled)
