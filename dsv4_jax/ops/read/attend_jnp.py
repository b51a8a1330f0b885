"""`attend` in jax.numpy: one softmax, online over pieces of bounded size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..formats.record import Record, decode_record
from ..nn.rms_norm import rms_norm
from ..nn.rope import apply_rope
from ..segments import Segments, one_token_segments, to_segments, to_tokens
from .entries import read_entries
from .window import read_window

Array = jax.Array

_HIGHEST = jax.lax.Precision.HIGHEST

TILE = 128
"""Tokens of a segment that attend together: so many share the rows between their windows."""

PIECE = 4096
"""Entries of a request that are dequantised at a time: 8 MiB."""

SCORES = 1 << 22
"""Scores of a request in one piece: 16 MiB."""


class Operands(NamedTuple):
    """The arrays of `attend`, in the order in which the native form takes them."""

    q: Array
    sink: Array
    slots: Array
    positions: Array
    ring: Record
    entries: Record | None
    table: Array | None  # with `entries`
    selected: Array | None
    fresh: Record | None
    segments: Segments | None  # with `fresh`
    angles: tuple[Array, Array] | None  # cos and sin of `RawQuery`


class Rule(NamedTuple):
    """What of a layer a token of `attend` sees, and how much it counts. Static, but for the layer."""

    layer: int | Array
    window: int
    ratio: int
    max_entries: int
    scale: float
    eps: float  # of `RawQuery`


class Keys(NamedTuple):
    """Vectors that serve as keys and as values, and how often each token of a tile sees them."""

    kv: Array  # (S, N, d) shared by the tokens of a segment, or (S, C, N, d); zero where no token sees the vector
    seen: Array  # (S, C, N) bool, or int32 where a vector may count more than once


class Softmax(NamedTuple):
    """A softmax under way: largest score, sum of the weights, weighted sum."""

    top: Array  # (S, C, H, 1)
    total: Array  # (S, C, H, 1)
    out: Array  # (S, C, H, d)


def attend_in_jnp(given: Operands, rule: Rule, readers: str | None) -> Array:
    """See `attend`; `readers`: how records are read."""
    if not given.q.size:
        return jnp.zeros_like(given.q)
    ring, selected, slots, positions = given.ring, given.selected, given.slots, given.positions
    layer, window, max_entries, scale = rule.layer, rule.window, rule.max_entries, rule.scale
    x = given.q.astype(jnp.float32)
    turn = None if given.angles is None else (given.angles[0][:, None], given.angles[1][:, None])
    if turn is not None:
        x = apply_rope(rms_norm(x, eps=rule.eps), *turn)
    known = (slots >= 0) & (slots < ring.nope.shape[1]) & (positions >= 0)
    segments = given.segments
    if segments is None:
        segments = one_token_segments(jnp.where(known, slots, -1), positions)
    lead, width = segments.tokens.shape, x.shape[-1]
    of_a_token = selected is not None and not _shared(lead[1], selected.shape[1], max_entries, x.shape[1])
    tile = min(max(1, lead[1]), TILE)
    if of_a_token and selected is not None:  # all entries of a tile's tokens are in memory at once
        tile = min(tile, max(1, 2 * PIECE // selected.shape[1]))
    tiles = -(-lead[1] // tile)
    padded = tiles * tile

    x = _padded(to_segments(x, segments), padded)
    selected = None if selected is None else _padded(to_segments(selected, segments), padded, -1)
    offsets = jnp.arange(padded, dtype=jnp.int32)[None]
    live = (segments.slots >= 0) & (segments.slots < ring.nope.shape[1])
    at = jnp.where(live[:, None] & (offsets < segments.counts[:, None]), segments.starts[:, None] + offsets, -1)
    line = None
    if given.fresh is not None:
        line = _line(ring, (given.fresh, segments), padded, layer=layer, window=window, readers=readers)

    def window_keys(at: Array, first: Array | int) -> Keys:
        """Of the tokens first … first + C - 1 of each segment, at positions `at` (S, C)."""
        if line is None:
            kv, rows = read_window(
                ring, segments.slots, at[:, 0], layer=layer, window=window, implementation=readers
            )  # what a padding token reads is zero
            # By position: sums do not depend on where the ring begins, nor on how many rows it has.
            back = jnp.arange(1 - window, 1, dtype=jnp.int32)[None]
            order = (at[:, :1] + back) % ring.nope.shape[2]
            kv = jnp.take_along_axis(kv, order[..., None], axis=1)
            rows = jnp.take_along_axis(rows, order, axis=1)[:, None]
        else:
            kv = jax.lax.dynamic_slice_in_dim(line, first, at.shape[1] + window - 1, axis=1)
            rows = (segments.starts - (window - 1) + first)[:, None] + jnp.arange(kv.shape[1], dtype=jnp.int32)[None]
            rows = rows[:, None]
        now = at[:, :, None]
        return Keys(kv, (rows >= 0) & (rows <= now) & (rows > now - window))

    def attend_tile(x: Array, at: Array, selected: Array | None, first: Array | int) -> Array:
        """x (S, C, H, d), at (S, C), selected (S, C, K), of the tokens `first` on of each segment."""
        groups = [window_keys(at, first)]
        many: Array | int = 0
        if given.entries is not None and given.table is not None:
            piece, pieces, many = _entry_pieces(
                given, segments.slots, at, selected, rule, of_a_token=of_a_token, readers=readers
            )
            if pieces == 1:  # few: all in one, which is faster
                groups.append(piece(0))
                many = 0
        state = _begin(x, groups, given.sink, scale)
        if not isinstance(many, int):
            state = jax.lax.fori_loop(0, many, lambda i, state: _join(state, x, piece(i), scale), state)
        return state.out / jnp.where(state.total == 0, 1.0, state.total)

    if tiles <= 1:
        out = attend_tile(x, at, selected, 0)
    else:
        parts = (
            _split(x, tiles), _split(at, tiles), None if selected is None else _split(selected, tiles),
            jnp.arange(tiles, dtype=jnp.int32) * tile,
        )  # fmt: skip
        out = jax.lax.map(lambda part: attend_tile(*part), parts)
        out = jnp.moveaxis(out, 0, 1).reshape(lead[0], padded, *out.shape[3:])
    out = to_tokens(out[:, : lead[1]].reshape(*lead, -1, width), segments)
    out = jnp.where(known[:, None, None], out, 0.0)  # also where the sink is not finite
    if turn is not None:
        out = apply_rope(out, *turn, inverse=True)
    return out.astype(given.q.dtype)


def _shared(tokens: int, chosen: int, max_entries: int, heads: int) -> bool:
    """Whether segments read all entries once, and not each token its own.

    With few heads an entry costs more to read than to multiply.
    """
    return tokens > 1 and max_entries <= chosen * (2 + 32 // heads)


def _padded(x: Array, size: int, value: int = 0) -> Array:
    """x (S, C, ...) -> (S, size, ...)."""
    if x.shape[1] == size:
        return x
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _split(x: Array, tiles: int) -> Array:
    """x (S, tiles * C, ...) -> (tiles, S, C, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], tiles, -1, *x.shape[2:]), 1, 0)


def _line(
    ring: Record, fresh: tuple[Record, Segments], size: int, *, layer: int | Array, window: int, readers: str | None
) -> Array:
    """The window - 1 positions before each segment, from the ring, then its own: (S, window - 1 + size, d) float32."""
    record, segments = fresh
    kv = _padded(to_segments(decode_record(record), segments), size)
    if window == 1:
        return kv
    old, _ = read_window(
        ring, segments.slots, segments.starts - 1, layer=layer, window=window - 1, implementation=readers
    )
    back = jnp.arange(1 - window, 0, dtype=jnp.int32)[None]
    rows = (segments.starts[:, None] + back) % ring.nope.shape[2]
    old = jnp.take_along_axis(old, rows[..., None], axis=1)
    return jnp.concatenate([old, kv], axis=1)


def _entry_pieces(
    given: Operands,
    slots: Array,
    at: Array,
    selected: Array | None,
    rule: Rule,
    *,
    of_a_token: bool,
    readers: str | None,
) -> tuple[Callable[[Any], Keys], int, Array]:
    """piece(i) -> the i-th part of the entries, how many parts there may be, and how many hold something.

    Of the tokens at positions `at` (S, C) of slots (S,); selected: (S, C, K).
    """
    entries, table, layer, max_entries = given.entries, given.table, rule.layer, rule.max_entries
    assert entries is not None
    assert table is not None
    whole = table
    blocks, per_block = entries.nope.shape[1:3]
    visible = jnp.minimum((at + 1) // rule.ratio, max_entries)  # (S, C), 0 for padding
    of_slot = table.at[jnp.maximum(slots, 0)].get(mode="clip")
    of_slot = jnp.where((of_slot >= 0) & (of_slot < blocks), of_slot, -1)

    if of_a_token and selected is not None:
        rows = min(selected.shape[2], PIECE)
        pieces = -(-selected.shape[2] // rows)
        fill = pieces * rows - selected.shape[2]
        selected = jnp.pad(selected, [(0, 0), (0, 0), (0, fill)], constant_values=-1)
        asked = jnp.where((selected >= 0) & (selected < visible[..., None]), selected, -1)
        column = jnp.where(asked >= 0, asked // per_block, table.shape[1])
        found = jax.vmap(lambda of, column: of.at[column].get(mode="fill", fill_value=-1))(of_slot, column)
        asked = jnp.where(found >= 0, asked, -1)
        each_slot = jnp.broadcast_to(slots[:, None], at.shape).reshape(-1)
        each_visible = visible.reshape(-1)

        def chosen(i: Any) -> Keys:
            part = jax.lax.dynamic_slice_in_dim(asked, i * rows, rows, axis=2)
            kv = read_entries(
                entries, whole, each_slot, each_visible, part.reshape(-1, rows), layer=layer, implementation=readers
            )
            return Keys(kv.reshape(*at.shape, rows, -1), part >= 0)

        return chosen, pieces, jnp.int32(pieces)

    columns_in_all = -(-max_entries // per_block)
    columns = max(
        1, min(columns_in_all, PIECE // per_block, max(256, SCORES // (at.shape[1] * given.q.shape[1])) // per_block)
    )
    pieces, rows = -(-columns_in_all // columns), columns * per_block
    fill = max(0, pieces * columns - table.shape[1])
    table, of_slot = (jnp.pad(x, [(0, 0), (0, fill)], constant_values=-1) for x in (table, of_slot))
    counts = None
    if selected is not None:
        asked = jnp.where((selected >= 0) & (selected < visible[..., None]), selected, pieces * rows)
        counts = jnp.zeros((*at.shape, pieces * rows), jnp.int32)
        s, c = (jnp.arange(n, dtype=jnp.int32) for n in at.shape)
        counts = counts.at[s[:, None, None], c[None, :, None], asked].add(1, mode="drop")
    most = jnp.max(visible, axis=1, initial=0)  # of a segment

    def shared(i: Any) -> Keys:
        start = i * rows
        part = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        kv = read_entries(entries, part, slots, jnp.clip(most - start, 0, rows), layer=layer, implementation=readers)
        has_block = jax.lax.dynamic_slice_in_dim(of_slot, i * columns, columns, axis=1) >= 0
        has_block = jnp.repeat(has_block, per_block, axis=1)[:, None]
        if counts is not None:
            of_piece = jax.lax.dynamic_slice_in_dim(counts, start, rows, axis=2)
            return Keys(kv, jnp.where(has_block, of_piece, 0))
        entry = start + jnp.arange(rows, dtype=jnp.int32)[None, None]
        return Keys(kv, has_block & (entry < visible[..., None]))

    return shared, pieces, -(-jnp.max(most, initial=0) // rows)


def _scores(x: Array, keys: Keys, scale: float) -> Array:
    """x (S, C, H, d) -> (S, C, H, N), -inf where a vector is not seen."""
    s, c, heads, width = x.shape
    if keys.kv.ndim == 4:
        scores = _few_by_many(x.reshape(s * c, heads, width), keys.kv.reshape(s * c, -1, width))
    else:  # the tokens and heads of a segment are rows of one product
        rows = x.reshape(s, c * heads, width)
        few = c == 1
        scores = _few_by_many(rows, keys.kv) if few else jnp.einsum("smd,snd->smn", rows, keys.kv, precision=_HIGHEST)
    return jnp.where(keys.seen.astype(jnp.bool_)[:, :, None], scores.reshape(s, c, heads, -1) * scale, -jnp.inf)


def _few_by_many(q: Array, kv: Array) -> Array:
    """q (S, few, d) . kv (S, N, d) -> (S, few, N).

    XLA:CPU is faster with the long side first, unless it joins the transposition to the product.
    """
    scores = jnp.einsum("snd,smd->snm", kv, q, precision=_HIGHEST)
    return jax.lax.optimization_barrier(scores).swapaxes(1, 2)


def _weighted(weights: Array, kv: Array) -> Array:
    """weights (S, C, H, N), kv of `Keys` -> (S, C, H, d)."""
    s, c, heads, n = weights.shape
    if kv.ndim == 4:
        weights, kv = weights.reshape(s * c, heads, n), kv.reshape(s * c, n, -1)
    else:
        weights = weights.reshape(s, c * heads, n)
    return jnp.einsum("smn,snd->smd", weights, kv, precision=_HIGHEST).reshape(s, c, heads, -1)


def _alone(keys: Keys, scores: Array) -> tuple[Keys, Array]:
    """What is not finite in a vector that tokens share reaches those that see it through their scores alone."""
    if scores.shape[1] == 1 or keys.kv.ndim == 4:
        return keys, scores
    finite = jnp.isfinite(keys.kv).all(axis=-1)
    scores = jnp.where(finite[:, None, None] | ~keys.seen.astype(jnp.bool_)[:, :, None], scores, jnp.nan)
    return keys._replace(kv=jnp.where(finite[..., None], keys.kv, 0.0)), scores


def _weights(keys: Keys, scores: Array, top: Array) -> Array:
    weights = jnp.exp(scores - top)
    return weights if keys.seen.dtype == jnp.bool_ else weights * keys.seen[:, :, None].astype(weights.dtype)


def _begin(x: Array, groups: list[Keys], sink: Array, scale: float) -> Softmax:
    """The softmax over the sink and these keys."""
    parts = [_alone(keys, _scores(x, keys, scale)) for keys in groups]
    sink = jnp.minimum(sink, jnp.finfo(jnp.float32).max)[None, None, :, None]  # one of infinity weighs all
    top = sink
    for _, scores in parts:
        top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)
    total, out = jnp.exp(sink - finite_top), jnp.zeros_like(x)
    for keys, scores in parts:
        weights = _weights(keys, scores, finite_top)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        out = out + _weighted(weights, keys.kv)
    return Softmax(top, total, out)


def _join(state: Softmax, x: Array, keys: Keys, scale: float) -> Softmax:
    """The softmax over these keys too."""
    keys, scores = _alone(keys, _scores(x, keys, scale))
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1, keepdims=True))
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)
    kept, weights = jnp.exp(state.top - finite_top), _weights(keys, scores, finite_top)
    total = state.total * kept + jnp.sum(weights, axis=-1, keepdims=True)
    return Softmax(top, total, state.out * kept + _weighted(weights, keys.kv))
