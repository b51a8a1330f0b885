"""CSA and HCA compression: tokens enter a tail, a full window becomes one entry of a block.

CSA (ratio 4) overlaps: an entry is the per-channel softmax over eight rows, lane a of the previous window and lane b
of its own. HCA (ratio 128) has one lane and no overlap. See arXiv 2606.19348, section 2.3. The state is float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import native
from .append_swa import resolve_writes
from .fp4 import GROUP_SIZE, hadamard, quantise_fp4
from .ordering import after
from .record import Record, encode_record
from .rms_norm import rms_norm
from .rope import apply_rope, rope_angles
from .rows import set_rows
from .segments import Segments, to_segments

Array = jax.Array


class CompressorTail(NamedTuple):
    """Tokens not compressed yet, and what the overlap needs of those that are; row = position mod rows, all float32.

    L layers, R slots, d channels of one lane. A row holds the token's wkv output (k) or its wgate output plus ape (z).
    """

    ka: Array  # (L, R, ratio - 1 or 2 * ratio - 1 with overlap, d)
    za: Array  # as ka
    kb: Array | None  # (L, R, ratio - 1, d), None without overlap
    zb: Array | None  # as kb


class CompressorWeights(NamedTuple):
    """What turns the raw projections into an entry."""

    ape: Array  # (ratio, lanes * d) float32, added to the gate by position mod ratio
    norm: Array  # (d,) float32, RMSNorm weight
    inv_freq: Array  # (rope_dim // 2,) float32, RoPE frequencies of compressed layers


class IndexerKeys(NamedTuple):
    """Indexer keys as stored, any leading shape (...)."""

    keys: Array  # (..., index_head_dim // 2) uint8 FP4 pairs | (..., index_head_dim) bfloat16 | float32
    scale: Array | None  # (..., groups) uint8; None in the exact forms


class ClosedWindows(NamedTuple):
    """The windows that close in a step; M = S * (most windows one segment can close)."""

    pooled: Array  # (M, d) float32
    slots: Array  # (M,) int32, -1 where nothing closes
    entries: Array  # (M,) int32, index of the entry within its request


def _rows_up_to(old: Array, fresh: Array, layer: int, segments: Segments, reach: int) -> Array:
    """The `reach` rows before each segment from the tail old (L, R, rows, d), then its own fresh (S, C, d)."""
    past = segments.starts[:, None] - reach + jnp.arange(reach, dtype=jnp.int32)[None]
    slots = jnp.maximum(segments.slots, 0)[:, None]
    before = old.at[layer, slots, past % old.shape[2]].get(mode="clip")
    return jnp.concatenate([before, fresh], axis=1)


def _pool(tail: CompressorTail, kv: Array, gate: Array, layer: int, segments: Segments, ratio: int) -> ClosedWindows:
    d = tail.ka.shape[-1]
    most = (segments.tokens.shape[1] - 1) // ratio + 1
    starts = segments.starts[:, None]
    last = (starts // ratio + 1 + jnp.arange(most, dtype=jnp.int32)[None]) * ratio - 1  # (S, most) closing positions
    closes = (last < starts + segments.counts[:, None]) & (segments.slots >= 0)[:, None]

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
        return (jnp.sum(weight * k, axis=2) / jnp.sum(weight, axis=2)).reshape(-1, d)

    if ratio > segments.tokens.shape[1]:
        # Most steps close no long window; then its rows (512 KiB a request in HCA) are not read at all.
        values = jax.lax.cond(jnp.any(closes), pooled, lambda: jnp.zeros((closes.size, d), jnp.float32))
    else:
        values = pooled()
    slots = jnp.where(closes, segments.slots[:, None], -1).reshape(-1)
    return ClosedWindows(values, slots, (last // ratio).reshape(-1))


def _store_tail(
    tail: CompressorTail,
    kv: Array,
    gate: Array,
    layer: int,
    slots: Array,
    positions: Array,
    one_token_per_slot: bool,
    read: Array,
) -> CompressorTail:
    """Tail with the step's tokens written; kv, gate (T, lanes * d); `read` is what had to be read before."""
    d = tail.ka.shape[-1]

    def store(rows: Array, values: Array) -> Array:
        roles = resolve_writes(slots, positions, rows.shape[1], rows.shape[2], one_token_per_slot)
        target = after(jnp.where(roles > 0, slots, -1), read)
        return set_rows(rows, (layer, target, positions % rows.shape[2]), values)

    return CompressorTail(
        ka=store(tail.ka, kv[:, :d]),
        za=store(tail.za, gate[:, :d]),
        kb=None if tail.kb is None else store(tail.kb, kv[:, d:]),
        zb=None if tail.zb is None else store(tail.zb, gate[:, d:]),
    )


def block_address(table: Array, slots: Array, entries: Array, per_block: int) -> tuple[Array, Array]:
    """Physical (block, offset) of entries (M,) of slots (M,) int32; block -1 where there is none.

    table (R, blocks of a request) int32 holds -1 where no block was given; a slot below 0 has none.
    """
    column = jnp.where(slots >= 0, entries // per_block, table.shape[1])
    return table.at[jnp.maximum(slots, 0), column].get(mode="fill", fill_value=-1), entries % per_block


def _compress(
    stored: NamedTuple,
    encode: Callable[[Array], NamedTuple],
    tail: CompressorTail,
    kv: Array,
    gate: Array,
    weights: CompressorWeights,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array,
    layer: int,
    eps: float,
) -> tuple[NamedTuple, CompressorTail]:
    ratio = weights.ape.shape[0]
    kv = kv.astype(jnp.float32)
    gate = gate.astype(jnp.float32) + weights.ape[jnp.where(positions >= 0, positions % ratio, 0)]
    closed = _pool(tail, to_segments(kv, segments), to_segments(gate, segments), layer, segments, ratio)
    values = rms_norm(closed.pooled, weights.norm, eps=eps)
    values = apply_rope(values, *rope_angles(closed.entries * ratio, weights.inv_freq))
    block, offset = block_address(table, closed.slots, closed.entries, jax.tree.leaves(stored)[0].shape[2])
    stored = jax.tree.map(lambda rows, new: set_rows(rows, (layer, block, offset), new), stored, encode(values))
    one_token_per_slot = segments.tokens.shape[1] == 1
    return stored, _store_tail(tail, kv, gate, layer, slots, positions, one_token_per_slot, closed.pooled)


def _compress_native(
    stored: NamedTuple,
    tail: CompressorTail,
    kv: Array,
    gate: Array,
    weights: CompressorWeights,
    segments: Segments,
    table: Array,
    *,
    name: str,
    **attributes: Any,
) -> tuple[NamedTuple, CompressorTail]:
    ratio = weights.ape.shape[0]
    windows = (segments.tokens.shape[1] - 1) // ratio + 1
    entries = segments.starts[:, None] // ratio + jnp.arange(windows, dtype=jnp.int32)[None]
    # The same for every layer of a step, and so computed once.
    cos, sin = rope_angles(entries * ratio, weights.inv_freq)
    if kv.dtype != gate.dtype:
        kv, gate = kv.astype(jnp.float32), gate.astype(jnp.float32)
    if segments.tokens.shape[1] == 1:
        # Token s is that of segment s, and nobody reads `tokens`; XLA would count them anew in a launch for every call.
        segments = segments._replace(tokens=segments.slots[:, None])
    state, structure = jax.tree.flatten((stored, tail))
    results = jax.ffi.ffi_call(
        name,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
        input_output_aliases={i: i for i in range(len(state))},
    )(
        *state, kv, gate, weights.ape, weights.norm, cos, sin, segments.slots, segments.starts, segments.counts,
        segments.tokens, table, **attributes,
    )  # fmt: skip
    return jax.tree.unflatten(structure, results)


def _dispatch(
    name: str,
    implementation: str | None,
    limit: Callable[[str], str | None],
    in_jnp: Callable[..., tuple[Any, CompressorTail]],
    in_native: Callable[..., tuple[Any, CompressorTail]],
    operands: tuple,
    tokens: tuple[Array, Array],
) -> tuple[Any, CompressorTail]:
    """The implementation asked for, or on each platform the native one if there is one; `tokens`: slots, positions."""
    if implementation not in (None, "jnp", "cpu", "cuda"):
        raise ValueError(f"{name}: got implementation {implementation!r}; expected None, 'jnp', 'cpu' or 'cuda'.")
    if implementation in ("cpu", "cuda"):
        if reason := limit(implementation):
            raise ValueError(f"{name}: implementation {implementation!r} cannot be used: {reason}; leave it to None.")
        return in_native(*operands)
    choices = {} if implementation else {p: in_native for p in native.available() if limit(p) is None}
    if not choices:
        return in_jnp(*operands, *tokens)
    choices = {platform: lambda operands, tokens: in_native(*operands) for platform in choices}
    return jax.lax.platform_dependent(
        operands, tokens, **choices, default=lambda operands, tokens: in_jnp(*operands, *tokens)
    )


def native_limit(platform: str, stored: NamedTuple, tail: CompressorTail, weights: CompressorWeights) -> str | None:
    """What keeps the native implementation for "cpu" or "cuda" from serving these arrays; None if nothing does."""
    if platform not in native.available():
        return f"the native library for {platform!r} is not installed"
    first = jax.tree.leaves(stored)[0]
    if first.dtype != jnp.uint8:
        return f"it stores only FP8 records and FP4 keys (uint8), not {first.dtype}"
    ratio, dim, rope_dim = weights.ape.shape[0], tail.ka.shape[-1], 2 * weights.inv_freq.shape[-1]
    lanes = 1 if tail.kb is None else 2
    if dim % 2:
        return f"it supports only an even number of values, not {dim}"
    geometry = (ratio, lanes, dim, rope_dim)
    supported = [(4, 2, 512, 64), (128, 1, 512, 64)] if isinstance(stored, Record) else [(4, 2, 128, 64)]
    if platform == "cuda" and geometry not in supported:
        return f"of (ratio, lanes, d, RoPE part) it supports only {' and '.join(map(str, supported))}, not {geometry}"
    return None


def compress(
    entries: Record,
    tail: CompressorTail,
    kv: Array,
    gate: Array,
    weights: CompressorWeights,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array,
    *,
    layer: int,
    eps: float,
    implementation: str | None = None,
) -> tuple[Record, CompressorTail]:
    """Takes the step's tokens into the tail and writes an entry for every window that closes.

    entries: Record arrays (L, blocks, entries per block, ...). tail: arrays (L, R, rows, d). kv, gate: raw projections
    (T, lanes * d) float32 | bfloat16, lane a first. slots, positions (T,) int32 with the segments made of them. table
    (R, blocks of a request) int32. A padding token changes nothing; an entry whose block is not in the table is
    dropped. `implementation`: "jnp", "cpu" or "cuda"; None takes the native one where there is one. The native ones
    agree bit for bit with each other; before it is quantised, an entry is that of the jax.numpy form within 1e-6.
    Returns the new entries and tail; ValueError for an implementation that cannot be used.
    """

    def in_jnp(entries, tail, kv, gate, weights, segments, table, slots, positions):
        return _compress(
            entries, lambda x: encode_record(x, entries), tail, kv, gate, weights, slots, positions, segments, table,
            layer, eps,
        )  # fmt: skip

    return _dispatch(
        "compress",
        implementation,
        lambda platform: native_limit(platform, entries, tail, weights),
        in_jnp,
        functools.partial(_compress_native, name="dsv4_compress", layer=np.int64(layer), eps=np.float32(eps)),
        (entries, tail, kv, gate, weights, segments, table),
        (slots, positions),
    )


def encode_keys(x: Array, format: str, *, rotate: bool = True) -> IndexerKeys:
    """Keys x (..., index_head_dim) float32 -> as stored; the FP4 formats are rotated by the Hadamard matrix first.

    rotate: False leaves the rotation out (queries must then do without it too).
    """
    if format in ("fp32", "bf16"):
        return IndexerKeys(x.astype(jnp.float32 if format == "fp32" else jnp.bfloat16), None)
    return IndexerKeys(*quantise_fp4(hadamard(x) if rotate else x, format))


def compress_indexer(
    keys: IndexerKeys,
    tail: CompressorTail,
    kv: Array,
    gate: Array,
    weights: CompressorWeights,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array,
    *,
    format: str,
    layer: int,
    eps: float,
    rotate: bool = True,
    implementation: str | None = None,
) -> tuple[IndexerKeys, CompressorTail]:
    """As `compress`, for the indexer's own keys; format "nvfp4" | "mxfp4" | "bf16" | "fp32", rotate as `encode_keys`.

    Raises ValueError also for FP4 keys whose groups are not those of the format.
    """
    if (
        format in GROUP_SIZE
        and keys.scale is not None
        and tail.ka.shape[-1] != GROUP_SIZE[format] * keys.scale.shape[-1]
    ):
        raise ValueError(
            f"compress_indexer: got keys.scale {keys.scale.shape}; expected a scale per {GROUP_SIZE[format]} of "
            f"{tail.ka.shape[-1]} values for {format!r}."
        )

    def in_jnp(keys, tail, kv, gate, weights, segments, table, slots, positions):
        return _compress(
            keys, lambda x: encode_keys(x, format, rotate=rotate), tail, kv, gate, weights, slots, positions, segments,
            table, layer, eps,
        )  # fmt: skip

    return _dispatch(
        "compress_indexer",
        implementation,
        lambda platform: native_limit(platform, keys, tail, weights),
        in_jnp,
        functools.partial(
            _compress_native, name="dsv4_compress_indexer", layer=np.int64(layer), eps=np.float32(eps), rotate=rotate
        ),
        (keys, tail, kv, gate, weights, segments, table),
        (slots, positions),
    )
