"""Reading paged pools: all entries of a request, or the chosen ones of each token."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import dispatch
from ..every_layer import attribute, slots_of, table_of
from ..formats.fp4 import GROUP_SIZE, dequantise_fp4
from ..formats.record import Record, decode_record, native_read_limit
from ..write.compress import IndexerKeys

Array = jax.Array
Stored = TypeVar("Stored", Record, IndexerKeys)


def read_entries(
    entries: Record,
    table: Array,
    slots: Array,
    counts: Array,
    selected: Array | None = None,
    *,
    layer: int | Array,
    max_blocks: int | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """The entries of each slot, or of each token those selected.

    entries: Record arrays (L, N, E, ...); layer: an int, or an array () int32 that is one of L.
    table (R, blocks of a request) int32, -1 where no block is given. slots (S,) int32 (-1: nothing).
    counts (S,) int32: entries 0 … count - 1 may be read. selected (S, K) int32: entries by index
    in the request, -1: none; without it entries 0 … max_blocks * E - 1 (by default as many as the table has). Returns
    (S, K, d) of `dtype`, zero where an entry may not be read or has no block. `implementation`: "jnp", "cpu" or "cuda",
    which return the same bits; None takes the native one where there is one. It reads no row that it does not return.
    ValueError for an implementation that cannot be used.
    """

    def in_jnp(entries: Record, *where: Array) -> Array:
        rows, valid = _gather(entries, *where, layer=layer, max_blocks=max_blocks)
        return jnp.where(valid[..., None], decode_record(rows, dtype), jnp.zeros((), dtype))

    def in_native(entries: Record, *where: Array) -> Array:
        width = entries.nope.shape[-1] + entries.rope.shape[-1]
        result = jax.ShapeDtypeStruct((*_shape(entries, *where, max_blocks=max_blocks), width), dtype)
        where = _where_of(entries, layer, *where)
        return dispatch.ffi_call("dsv4_read_entries", result)(*entries, *where, layer=attribute(layer))

    return dispatch.call(
        "read_entries",
        implementation,
        lambda platform: native_read_limit(platform, entries, dtype),
        in_native,
        in_jnp,
        *(entries, table, slots, counts, *(() if selected is None else (selected,))),
    )


def read_keys(
    keys: IndexerKeys,
    table: Array,
    slots: Array,
    counts: Array,
    *,
    format: str,
    layer: int | Array,
    max_blocks: int | None = None,
    implementation: str | None = None,
) -> Array:
    """As `read_entries`, the indexer keys of each slot: (S, K, index_head_dim) float32, zero where there is none.

    format "nvfp4" | "mxfp4" | "bf16" | "fp32"; FP4 keys come back rotated by the Hadamard matrix, as they are stored.
    """

    def in_jnp(keys: IndexerKeys, *where: Array) -> Array:
        rows, valid = _gather(keys, *where, layer=layer, max_blocks=max_blocks)
        return jnp.where(valid[..., None], _decode_keys(rows, format), 0.0)

    def in_native(keys: IndexerKeys, *where: Array) -> Array:
        shape = (*_shape(keys, *where, max_blocks=max_blocks), 2 * keys.keys.shape[-1])
        call = dispatch.ffi_call("dsv4_read_keys", jax.ShapeDtypeStruct(shape, jnp.float32))
        return call(*keys, *_where_of(keys, layer, *where), layer=attribute(layer))

    def limit(platform: str) -> str | None:
        if format not in GROUP_SIZE:
            return f"it reads only FP4 keys, not {format}"
        if platform == "cuda" and keys.keys.shape[-1] != 64:
            return f"it reads only keys of 128 values, not {2 * keys.keys.shape[-1]}"
        return None

    return dispatch.call("read_keys", implementation, limit, in_native, in_jnp, keys, table, slots, counts)


def _where_of(stored: NamedTuple, layer: int | Array, table: Array, slots: Array, *others: Array) -> tuple[Array, ...]:
    """Table, slots and so on as native calls take them with `attribute(layer)`."""
    num_layers, num_blocks = jax.tree.leaves(stored)[0].shape[:2]
    return table_of(table, layer, num_layers, num_blocks), slots_of(slots, layer, table.shape[0]), *others


def _shape(
    stored: NamedTuple,
    table: Array,
    slots: Array,
    counts: Array,
    selected: Array | None = None,
    *,
    max_blocks: int | None,
) -> tuple[int, int]:
    """(S, K) of what a call reads."""
    if selected is not None:
        return selected.shape[0], selected.shape[1]
    blocks = table.shape[1] if max_blocks is None else min(max_blocks, table.shape[1])
    return slots.shape[0], blocks * jax.tree.leaves(stored)[0].shape[2]


def _gather(
    stored: Stored,
    table: Array,
    slots: Array,
    counts: Array,
    selected: Array | None = None,
    *,
    layer: int | Array,
    max_blocks: int | None,
) -> tuple[Stored, Array]:
    """Arrays (L, N, E, ...) -> (S, K, ...) as stored, and which of them are entries: (S, K) bool."""
    _, num_blocks, per_block = jax.tree.leaves(stored)[0].shape[:3]
    if not num_blocks:  # XLA gathers nothing from an empty array: one block, which no table names
        stored = jax.tree.map(lambda x: jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype), stored)
    live = ((slots >= 0) & (slots < table.shape[0]))[:, None]
    of_slot = table.at[jnp.maximum(slots, 0)].get(mode="clip")
    if selected is None:
        columns = _shape(stored, table, slots, counts, max_blocks=max_blocks)[1] // per_block
        blocks = of_slot[:, :columns]

        def gather(x: Array) -> Array:
            got = x.at[layer, jnp.maximum(blocks, 0)].get(mode="clip")
            return got.reshape(got.shape[0], columns * per_block, *got.shape[3:])

        entry = jnp.arange(columns * per_block, dtype=jnp.int32)[None]
        valid = live & (entry < counts[:, None]) & jnp.repeat(blocks >= 0, per_block, axis=1)
    else:
        column = jnp.where(selected >= 0, selected // per_block, table.shape[1])
        block = jnp.take_along_axis(of_slot, column, axis=1, mode="fill", fill_value=-1)

        def gather(x: Array) -> Array:
            return x.at[layer, jnp.maximum(block, 0), selected % per_block].get(mode="clip")

        valid = live & (selected >= 0) & (selected < counts[:, None]) & (block >= 0)
    return jax.tree.map(gather, stored), valid


def _decode_keys(keys: IndexerKeys, format: str) -> Array:
    """Indexer keys as stored -> (..., index_head_dim) float32."""
    if keys.scale is None:
        return keys.keys.astype(jnp.float32)
    return dequantise_fp4(keys.keys, keys.scale, format)
