"""Copying a request inside the cache: its state row, and the blocks it cannot share."""

from functools import partial

import jax
import jax.numpy as jnp

from ..kv_cache import KVCache

Array = jax.Array


@partial(jax.jit, donate_argnames="cache")
def copy_slot(cache: KVCache, source: Array, target: Array, copies: dict[str, Array]) -> KVCache:
    """The cache with slot `target` holding what `source` holds: ring, tails and block table row.

    source, target: () int32. copies by kind: (n, 2) int32 pairs (block to read, block to write), -1 for padding; in the
    target's table the second takes the place of the first. In place when donated: O(state of a slot + copied blocks).
    """

    def copy_row(x: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(x, source, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=1)

    def copy_blocks(x: Array, pairs: Array) -> Array:
        def copy(i: Array, x: Array) -> Array:
            # Padding copies a block onto itself.
            read = jnp.maximum(pairs[i, 0], 0)
            write = jnp.where(pairs[i, 0] < 0, read, pairs[i, 1])
            block = jax.lax.dynamic_index_in_dim(x, read, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, block, write, axis=1)

        return jax.lax.fori_loop(0, pairs.shape[0], copy, x)

    state = jax.tree.map(copy_row, cache.state)
    paged = {kind: jax.tree.map(partial(copy_blocks, pairs=copies[kind]), pool) for kind, pool in cache.paged.items()}
    table = {}
    for kind, rows in cache.block_table.items():
        row = rows[source]
        replaced = row[:, None] == copies[kind][None, :, 0]
        new = jnp.max(jnp.where(replaced, copies[kind][None, :, 1], -1), axis=1)
        table[kind] = rows.at[target].set(jnp.where((row >= 0) & jnp.any(replaced, axis=1), new, row))
    return cache.replace_state(state, paged, table)
