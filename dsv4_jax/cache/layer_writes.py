"""The arrays of the cache that a layer writes to, as one operation takes them."""

import jax

from ..ops.segments import Segments
from ..ops.write.write_layer import LayerState, Projections, RawWindow, write_layer
from .kv_cache import KVCache

Array = jax.Array


def write_at_once(
    cache: KVCache,
    layer_idx: int,
    window: RawWindow,
    compressor: Projections | None,
    indexer: Projections | None,
    slots: Array,
    positions: Array,
    segments: Segments,
    table: Array | None,
    *,
    eps: float,
) -> KVCache:
    """The cache after `ops.write_layer` in one layer; arguments and errors as there."""
    schema = cache.schemas[layer_idx]
    kind = schema.kind
    state, pool = cache.state[kind], cache.paged.get(kind)
    arrays = LayerState(state.ring)
    if pool is not None:
        arrays = LayerState(state.ring, pool.entries, state.tail, pool.indexer, state.indexer_tail)
    arrays = write_layer(
        arrays, window, compressor, indexer, slots, positions, segments, table, layer=cache.layers[layer_idx], eps=eps,
        format=schema.indexer_dtype,
    )  # fmt: skip
    cache = cache.with_state(kind, ring=arrays.ring, tail=arrays.tail, indexer_tail=arrays.keys_tail)
    return cache if pool is None else cache.with_paged(kind, entries=arrays.entries, indexer=arrays.keys)
