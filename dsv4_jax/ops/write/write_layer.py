"""All that a layer writes in a decode step, in one operation: window row, compressed entry, indexer key."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import dispatch
from ..every_layer import attribute
from ..formats.record import Record
from ..segments import Segments
from . import append_swa, compress
from .append_swa import SWARing
from .append_swa_fused import append_swa_fused, fused_operands
from .compress import CompressorWeights, IndexerKeys, Tail, addresses, compress_indexer, compress_operands
from .compressor_tail import CompressorTail


class LayerState(NamedTuple):
    """The arrays that a layer of some kind writes to, stacked over layers; None where it has none."""

    ring: SWARing
    entries: Record | None = None
    tail: Tail | None = None
    keys: IndexerKeys | None = None
    keys_tail: Tail | None = None


class RawWindow(NamedTuple):
    """What ``append_swa_fused`` takes of T tokens."""

    kv: Array  # (T, n + r) float32 | bfloat16, raw output of the wkv projection
    norm: Array  # (n + r,) float32, the RMSNorm weight
    cos: Array  # (T, r / 2) float32, of each token's position
    sin: Array  # (T, r / 2) float32


class Projections(NamedTuple):
    """What ``compress`` and ``compress_indexer`` take of T tokens."""

    kv: Array  # (T, lanes * d) float32 | bfloat16, lane a first
    gate: Array  # as kv
    weights: CompressorWeights


def write_layer(
    state: LayerState,
    window: RawWindow,
    compressor: Projections | None,
    indexer: Projections | None,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array | None,
    *,
    layer: int | Array,
    eps: float,
    format: str | None = None,
    implementation: str | None = None,
) -> LayerState:
    """``append_swa_fused``, ``compress`` and ``compress_indexer`` of a decode step, in which no slot comes twice.

    An SWA layer has no compressor, an HCA layer no indexer. Stores the bits that the three operations store with the
    same implementation; on a GPU it is one launch, in which different blocks do the different parts.

    Args:
      state: the arrays to write to.
      window, compressor, indexer: the tokens' projections.
      slots: (T,) int32.
      positions: (T,) int32.
      segments: one segment a token (``one_token_segments``).
      table: (R, blocks of a request) int32; None for an SWA layer.
      layer: which layer of the stacks to write; an array () int32 must be one of them.
      eps: of every RMSNorm.
      format: of the indexer keys, as for ``compress_indexer``.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The arrays after the writes.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer or implementation, for parts that do not fit the state, and for segments of
        several tokens.
    """
    _check(state, compressor, indexer, segments, table)

    def one_by_one(
        form: str | None,
        state: LayerState,
        window: RawWindow,
        compressor: Projections | None,
        indexer: Projections | None,
        slots: Array,
        positions: Array,
        segments: Segments,
        table: Array | None,
    ) -> LayerState:
        options: dict[str, Any] = {"layer": layer, "eps": eps, "implementation": form}
        of_keys: dict[str, Any] = {**options, "format": format}
        where: Any = slots, positions, segments, table
        if indexer is not None and state.keys is not None and isinstance(state.keys_tail, CompressorTail):
            keys, keys_tail = compress_indexer(state.keys, state.keys_tail, *indexer, *where, **of_keys)
            state = state._replace(keys=keys, keys_tail=keys_tail)
        if compressor is not None and state.entries is not None and state.tail is not None:
            entries, tail = compress.compress(state.entries, state.tail, *compressor, *where, **options)
            state = state._replace(entries=entries, tail=tail)
        ring = append_swa_fused(state.ring, *window, slots, positions, one_token_per_slot=True, **options)
        return state._replace(ring=ring)

    operands = (state, window, compressor, indexer, slots, positions, segments, table)
    # What the three operations check, they check here too.
    jax.eval_shape(functools.partial(one_by_one, implementation), *operands)
    if compressor is None or implementation == "jnp":
        return one_by_one(implementation, *operands)
    return dispatch.call(
        "write_layer",
        implementation,
        lambda platform: native_limit(platform, state, compressor, indexer),
        functools.partial(_in_native, layer=layer, eps=eps),
        functools.partial(one_by_one, None),
        *operands,
    )


def native_limit(
    platform: str, state: LayerState, compressor: Projections | None, indexer: Projections | None
) -> str | None:
    """What keeps the native implementation for "cpu" or "cuda" from serving this layer; None if nothing does."""
    reason = append_swa.native_limit(platform, state.ring)
    for part, stored, tail in ((compressor, state.entries, state.tail), (indexer, state.keys, state.keys_tail)):
        if part is not None and tail is not None:
            reason = reason or compress.native_limit(platform, stored, tail, part.weights)
    return reason


def _in_native(
    state: LayerState,
    window: RawWindow,
    compressor: Projections,
    indexer: Projections | None,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array,
    *,
    layer: int | Array,
    eps: float,
) -> LayerState:
    if len({part.kv.dtype for part in (window, compressor, indexer) if part is not None}) > 1:
        window, compressor, indexer = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (window, compressor, indexer)
        )
    assert state.tail is not None  # of layers with a compressor
    where = addresses(state.entries, state.tail, segments, table, layer)
    # Each part's state, then its inputs: the operands of the three operations, one after the other.
    parts: list[tuple[Any, list[Array]]] = [
        (state.ring, fused_operands(state.ring, *window, slots, positions, layer, one_token_per_slot=True)),
        ((state.entries, state.tail), compress_operands(*compressor, *where)),
    ]
    if indexer is not None:
        parts.append(((state.keys, state.keys_tail), compress_operands(*indexer, *where)))
    operands: list[Array] = []
    aliases: dict[int, int] = {}
    counts: list[int] = []
    for arrays, inputs in parts:
        leaves = jax.tree.leaves(arrays)
        aliases |= {len(operands) + i: len(aliases) + i for i in range(len(leaves))}
        operands += [*leaves, *inputs]
        counts.append(len(leaves) + len(inputs))
    results = dispatch.ffi_call(
        "dsv4_write_layer",
        [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in aliases],
        input_output_aliases=aliases,
    )(*operands, layer=attribute(layer), eps=np.float32(eps), of_entries=np.int64(counts[1]))
    return jax.tree.unflatten(jax.tree.structure(state), results)


def _check(
    state: LayerState,
    compressor: Projections | None,
    indexer: Projections | None,
    segments: Segments,
    table: Array | None,
) -> None:
    given = {
        "compressor": compressor, "indexer": indexer, "state.entries": state.entries, "state.tail": state.tail,
        "state.keys": state.keys, "state.keys_tail": state.keys_tail, "table": table,
    }  # fmt: skip
    needed = set() if compressor is None and indexer is None else {"compressor", "state.entries", "state.tail", "table"}
    needed |= {"indexer", "state.keys", "state.keys_tail"} if indexer is not None else set()
    kind = "a CSA" if indexer is not None else "an HCA" if compressor is not None else "an SWA"
    for name, part in given.items():
        if (part is None) == (name in needed):
            got, expected = ("None", "it") if part is None else ("it", "None")
            raise ValueError(f"write_layer: got {got} for {name}; expected {expected} in {kind} layer.")
    if segments.tokens.shape[1] != 1:
        raise ValueError(
            f"write_layer: got segments of up to {segments.tokens.shape[1]} tokens; expected one token of a slot. "
            "Where a slot brings several, use the three operations."
        )
