"""Reading paged pools: all entries of a request, or the chosen ones of each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .compress import IndexerKeys, block_address
from .fp4 import dequantise_fp4

Array = jax.Array


def read_blocks(stored: NamedTuple, table: Array, slots: Array, *, layer: int, max_blocks: int) -> NamedTuple:
    """Entries 0 … max_blocks * E - 1 of each slot, as stored: arrays (L, N, E, ...) -> (S, max_blocks * E, ...).

    table (R, blocks of a request) int32, slots (S,) int32. Where no block is given, what comes back means nothing.
    """
    blocks = table.at[jnp.maximum(slots, 0)].get(mode="clip")[:, :max_blocks]

    def gather(x: Array) -> Array:
        got = x.at[layer, jnp.maximum(blocks, 0)].get(mode="clip")
        return got.reshape(got.shape[0], -1, *got.shape[3:])

    return jax.tree.map(gather, stored)


def read_selected(stored: NamedTuple, table: Array, slots: Array, selected: Array, *, layer: int) -> NamedTuple:
    """Entries selected (T, K) int32 of slots (T,), as stored: arrays (L, N, E, ...) -> (T, K, ...); -1: anything."""
    pool = jax.tree.leaves(stored)[0]
    flat_slots = jnp.broadcast_to(slots[:, None], selected.shape).reshape(-1)
    block, offset = block_address(table, flat_slots, jnp.maximum(selected, 0).reshape(-1), pool.shape[2])
    block, offset = jnp.maximum(block, 0).reshape(selected.shape), offset.reshape(selected.shape)
    return jax.tree.map(lambda x: x.at[layer, block, offset].get(mode="clip"), stored)


def decode_keys(keys: IndexerKeys, format: str) -> Array:
    """Indexer keys as stored -> (..., index_head_dim) float32; FP4 keys come back rotated by the Hadamard matrix."""
    if keys.scale is None:
        return keys.keys.astype(jnp.float32)
    return dequantise_fp4(keys.keys, keys.scale, format)
