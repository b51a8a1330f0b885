"""A request's part of the cache, read, written and copied between steps: state row, blocks, table entries.

Each is one compiled call that touches what it names and no more; writes donate the cache and are in place. Numbers of
blocks are padded to powers of two, so that few programs are compiled.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ..host.blocks import rows_array
from ..kv_cache import KVCache
from ..paged_cache import PagedKVPool
from ..state_cache import StateCachePool

Array = jax.Array

MAX_BLOCKS = 64
"""Most blocks that one call reads or writes."""


def enter_cells(cache: KVCache, rows: dict[str, list[tuple[int, int, int]]]) -> KVCache:
    """The cache with rows (slot, column, block) entered in its tables, by kind. The tables are donated."""
    padded = {kind: rows_array(r, power_of_two(len(r)), 3) for kind, r in rows.items() if r}
    if not padded:
        return cache
    entered = _enter({kind: cache.block_table[kind] for kind in padded}, padded)
    return cache.replace_tables({**cache.block_table, **entered})


@partial(jax.jit, donate_argnums=0)
def _enter(tables: dict[str, Array], rows: dict[str, np.ndarray]) -> dict[str, Array]:
    def enter(table: Array, rows: np.ndarray) -> Array:
        slot = jnp.where(rows[:, 0] >= 0, rows[:, 0], table.shape[0])
        return table.at[slot, rows[:, 1]].set(rows[:, 2], mode="drop")

    return {kind: enter(table, rows[kind]) for kind, table in tables.items()}


@jax.jit
def _read_rows(arrays: dict[str, Array], slot: Array, rows: dict[str, Array]) -> dict[str, Array]:
    def read(x: Array, rows: Array) -> Array:
        return jnp.take(jax.lax.dynamic_index_in_dim(x, slot, axis=1, keepdims=False), rows, axis=1)

    return {name: read(x, rows[name]) for name, x in arrays.items()}


def read_slot_rows(arrays: dict[str, Array], slot: int, ranges: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """The rows of positions [first, end) of one slot, by name: arrays (L, R, rows, ...) -> (L, end - first, ...)."""
    rows = {}
    for name, (first, end) in ranges.items():
        # All rows or a single one, of which none may count: two programs, whatever the length.
        most = arrays[name].shape[2]
        rows[name] = (first + np.arange(most if end > first else 1, dtype=np.int32)) % np.int32(most)
    read = _read_rows({name: arrays[name] for name in ranges}, np.int32(slot), rows)
    return {name: np.asarray(x)[:, : ranges[name][1] - ranges[name][0]].copy() for name, x in read.items()}


@partial(jax.jit, donate_argnums=0)
def _write_slot(
    state: dict[str, StateCachePool], slot: Array, values: dict[str, StateCachePool]
) -> dict[str, StateCachePool]:
    def write(x: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, row[:, None], slot, axis=1)

    return jax.tree.map(write, state, values)


def write_slot(cache: KVCache, slot: int, values: dict[str, StateCachePool]) -> KVCache:
    """The cache with ring and tails of one slot replaced: `values` has arrays (L, ...). Donates the state."""
    state = _write_slot(cache.state, np.int32(slot), values)
    return cache.replace_state(state, cache.paged, cache.block_table)


def slot_shapes(cache: KVCache) -> dict[str, StateCachePool]:
    """Shapes and dtypes of what `write_slot` takes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), cache.state)


@jax.jit
def _read_blocks(pool: PagedKVPool, ids: Array) -> PagedKVPool:
    return jax.tree.map(lambda x: jnp.take(x, ids, axis=1), pool)


def read_blocks(pool: PagedKVPool, ids: Sequence[int]) -> list[tuple[PagedKVPool, int]]:
    """Blocks `ids` of a stacked pool, in parts: arrays (L, N, E, ...) -> (L, n, E, ...), of which a number counts."""
    return [(_read_blocks(pool, padded), n) for padded, n in _parts(ids)]


@partial(jax.jit, donate_argnums=0)
def _write_blocks(pool: PagedKVPool, ids: Array, values: PagedKVPool, count: Array) -> PagedKVPool:
    def write(x: Array, rows: Array) -> Array:
        def one(i: Array, x: Array) -> Array:
            row = jax.lax.dynamic_index_in_dim(rows, i, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, row, ids[i], axis=1)

        return jax.lax.fori_loop(0, count, one, x)

    return jax.tree.map(write, pool, values)


def write_blocks(pool: PagedKVPool, ids: Sequence[int], values: PagedKVPool) -> Iterator[PagedKVPool]:
    """The pool with blocks `ids` replaced: values are numpy arrays (L, len(ids), E, ...). Donates the pool.

    Yields the pool after each part, because the one before is gone: whoever keeps it loses nothing if the next fails.
    """
    start = 0
    for padded, n in _parts(ids):
        fill = [(0, 0), (0, len(padded) - n)]
        part = jax.tree.map(
            lambda x, at=start, n=n, fill=fill: np.pad(x[:, at : at + n], fill + [(0, 0)] * (x.ndim - 2)), values
        )
        pool = _write_blocks(pool, padded, part, np.int32(n))
        yield pool
        start += n


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


def _parts(ids: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """ids in pieces of at most MAX_BLOCKS, each padded to a power of two with its first, and how many of it count."""
    parts = []
    for start in range(0, len(ids), MAX_BLOCKS):
        part = list(ids[start : start + MAX_BLOCKS])
        padded = part + part[:1] * (power_of_two(len(part)) - len(part))
        parts.append((np.array(padded, np.int32), len(part)))
    return parts


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
