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

from .. import dispatch
from ..every_layer import attribute, segments_of, table_of
from ..formats.fp4 import GROUP_SIZE, hadamard, quantise_fp4
from ..formats.record import Record, encode_record
from ..nn.rms_norm import rms_norm
from ..nn.rope import apply_rope, rope_angles
from ..segments import StepTokens
from . import compressor_tail, running_tail
from .compressor_tail import ClosedWindows, CompressorTail
from .rows import set_rows
from .running_tail import RunningTail

Array = jax.Array
Tail = CompressorTail | RunningTail


class CompressorWeights(NamedTuple):
    """What turns the raw projections into an entry."""

    ape: Array  # (ratio, lanes * d) float32, added to the gate by position mod ratio
    norm: Array  # (d,) float32, RMSNorm weight
    inv_freq: Array  # (rope_dim // 2,) float32, RoPE frequencies of compressed layers


class Projections(NamedTuple):
    """What ``compress`` and ``compress_indexer`` take of T tokens."""

    kv: Array  # (T, lanes * d) float32 | bfloat16, lane a first
    gate: Array  # as kv
    weights: CompressorWeights


class IndexerKeys(NamedTuple):
    """Indexer keys as stored, any leading shape (...)."""

    keys: Array  # (..., index_head_dim // 2) uint8 FP4 pairs | (..., index_head_dim) bfloat16 | float32
    scale: Array | None  # (..., groups) uint8; None in the exact forms


def block_address(table: Array, slots: Array, entries: Array, per_block: int) -> tuple[Array, Array]:
    """Physical (block, offset) of entries (M,) of slots (M,) int32; block -1 where there is none.

    table (R, blocks of a request) int32 holds -1 where no block was given; a slot below 0 has none.
    """
    column = jnp.where(slots >= 0, entries // per_block, table.shape[1])
    return table.at[jnp.maximum(slots, 0), column].get(mode="fill", fill_value=-1), entries % per_block


def _compress(
    stored: Any,
    encode: Callable[[Array], Any],
    tail: Tail,
    given: Projections,
    tokens: StepTokens,
    layer: int | Array,
    eps: float,
) -> tuple[Any, Tail]:
    weights, positions = given.weights, tokens.positions
    ratio = weights.ape.shape[0]
    kv = given.kv.astype(jnp.float32)
    gate = given.gate.astype(jnp.float32) + weights.ape[jnp.where(positions >= 0, positions % ratio, 0)]
    closed: ClosedWindows
    if isinstance(tail, RunningTail):
        closed, tail = running_tail.take_tokens(tail, kv, gate, layer, tokens.grouped, ratio)
    else:
        closed, tail = compressor_tail.take_tokens(tail, kv, gate, layer, tokens, ratio)
    values = rms_norm(closed.pooled, weights.norm, eps=eps)
    values = apply_rope(values, *rope_angles(closed.entries * ratio, weights.inv_freq))
    block, offset = block_address(tokens.blocks, closed.slots, closed.entries, jax.tree.leaves(stored)[0].shape[2])
    stored = jax.tree.map(lambda rows, new: set_rows(rows, (layer, block, offset), new), stored, encode(values))
    return stored, tail


def _compress_native(
    stored: Any, tail: Tail, given: Projections, tokens: StepTokens, *, name: str, layer: int | Array, **attributes: Any
) -> tuple[Any, Tail]:
    state, structure = jax.tree.flatten((stored, tail))
    results = dispatch.ffi_call(
        name,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
        input_output_aliases={i: i for i in range(len(state))},
    )(
        *state,
        *compress_operands(given, addressed(tokens, stored, tail, layer)),
        layer=attribute(layer),
        **attributes,
    )
    return jax.tree.unflatten(structure, results)


def addressed(tokens: StepTokens, stored: Any, tail: Tail, layer: int | Array) -> StepTokens:
    """Segments and table as the native operations take them with `attribute(layer)`."""
    num_layers, num_slots = tail[0].shape[:2]
    num_blocks = jax.tree.leaves(stored)[0].shape[1]
    return tokens._replace(
        segments=segments_of(tokens.grouped, layer, num_slots),
        table=table_of(tokens.blocks, layer, num_layers, num_blocks),
    )


def compress_operands(given: Projections, tokens: StepTokens) -> list[Array]:
    """The native operations' operands after the arrays of pool and tail."""
    kv, gate, weights = given
    segments, ratio = tokens.grouped, weights.ape.shape[0]
    windows = (segments.tokens.shape[1] - 1) // ratio + 1
    entries = segments.starts[:, None] // ratio + jnp.arange(windows, dtype=jnp.int32)[None]
    # The same for every layer of a step, and so computed once.
    cos, sin = rope_angles(entries * ratio, weights.inv_freq)
    if kv.dtype != gate.dtype:
        kv, gate = kv.astype(jnp.float32), gate.astype(jnp.float32)
    if segments.tokens.shape[1] == 1:
        # Token s is that of segment s, and nobody reads `tokens`; XLA would count them anew in a launch for every call.
        segments = segments._replace(tokens=segments.slots[:, None])
    where = (segments.slots, segments.starts, segments.counts, segments.tokens, tokens.blocks)
    return [kv, gate, weights.ape, weights.norm, cos, sin, *where]


def native_limit(platform: str, stored: Any, tail: Tail, weights: CompressorWeights) -> str | None:
    """What keeps the native implementation for "cpu" or "cuda" from serving these arrays; None if nothing does."""
    if platform not in dispatch.available():
        return f"the native library for {platform!r} is not installed"
    first = jax.tree.leaves(stored)[0]
    if first.dtype != jnp.uint8:
        return f"it stores only FP8 records and FP4 keys (uint8), not {first.dtype}"
    ratio, rope_dim = weights.ape.shape[0], 2 * weights.inv_freq.shape[-1]
    dim, lanes = tail[0].shape[-1], 1 if isinstance(tail, RunningTail) or tail.kb is None else 2
    if dim % 2:
        return f"it supports only an even number of values, not {dim}"
    geometry = (ratio, lanes, dim, rope_dim)
    supported = [(4, 2, 512, 64), (128, 1, 512, 64)] if isinstance(stored, Record) else [(4, 2, 128, 64)]
    if platform == "cuda" and geometry not in supported:
        return f"of (ratio, lanes, d, RoPE part) it supports only {' and '.join(map(str, supported))}, not {geometry}"
    return None


def compress(
    entries: Record,
    tail: Tail,
    given: Projections,
    tokens: StepTokens,
    *,
    layer: int | Array,
    eps: float,
    implementation: str | None = None,
) -> tuple[Record, Tail]:
    """Takes the step's tokens into the tail and writes an entry for every window that closes.

    A padding token changes nothing; an entry whose block is not in the table is dropped. The native implementations
    agree bit for bit with each other; before it is quantised, an entry is that of the jax.numpy form, with either tail,
    within 1e-6.

    Args:
      entries: Record arrays (L, blocks, entries per block, ...).
      tail: a full one, or a running one where there is no overlap.
      given: the raw projections.
      tokens: where they go, with segments and table.
      layer: index into L; an array () int32 must be one.
      eps: of the RMSNorm.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The new entries and tail.
    Raises:
      ValueError: for an implementation that cannot be used.
    """

    def in_jnp(entries: Record, tail: Tail, given: Projections, tokens: StepTokens) -> tuple[Record, Tail]:
        return _compress(entries, lambda x: encode_record(x, entries), tail, given, tokens, layer, eps)

    return dispatch.call(
        "compress",
        implementation,
        lambda platform: native_limit(platform, entries, tail, given.weights),
        functools.partial(_compress_native, name="dsv4_compress", layer=layer, eps=np.float32(eps)),
        in_jnp,
        *(entries, tail, given, tokens),
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
    given: Projections,
    tokens: StepTokens,
    *,
    format: str,
    layer: int | Array,
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

    def in_jnp(keys: IndexerKeys, tail: Tail, given: Projections, tokens: StepTokens) -> tuple[IndexerKeys, Tail]:
        return _compress(keys, lambda x: encode_keys(x, format, rotate=rotate), tail, given, tokens, layer, eps)

    return dispatch.call(
        "compress_indexer",
        implementation,
        lambda platform: native_limit(platform, keys, tail, given.weights),
        functools.partial(
            _compress_native, name="dsv4_compress_indexer", layer=layer, eps=np.float32(eps), rotate=rotate
        ),
        in_jnp,
        *(keys, tail, given, tokens),
    )
