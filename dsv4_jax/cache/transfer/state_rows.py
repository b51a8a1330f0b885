"""The part of a request's state that matters: which rows of ring and tails a length still needs, by position.

Rows are named like "csa.ring.nope" or "hca.tail.ka": kind, then the place in StateCachePool. Their place in a cache
follows from the position and its number of rows, so they can move to a cache with another slack.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..kv_cache import KVCache
from ..schema import CacheSchema
from ..state_cache import StateCachePool
from .slots import read_slot_rows, slot_shapes, write_slot

_DERIVED = ("ring.pos", "ring.head")
"""Arrays that follow from the positions of the rows."""


def first_row(schema: CacheSchema, name: str, least: int) -> int:
    """The oldest position whose row a request of at least `least` tokens still needs; it needs all that follow.

    name: such as "ring.nope". The next token sees window - 1 tokens before it; a compressor needs the tokens of the
    window that is open, lane a of an overlapping one also those of the window before; sums of that window ("sums") are
    needed only as they are after the newest token.
    """
    if name.startswith("ring."):
        return max(least - (schema.swa_window_size - 1), 0)
    if name.endswith(".sums") and least % schema.compress_ratio:
        return least - 1
    lag = schema.compress_ratio if schema.overlap and name.endswith("a") else 0
    return max(least - least % schema.compress_ratio - lag, 0)


def row_ranges(schemas: dict[str, CacheSchema], state: Any, least: int, length: int) -> dict[str, tuple[int, int]]:
    """By name the positions [first, end) of the rows that matter to a request of `least` to `length` tokens."""
    return {
        f"{kind}.{name}": (min(first_row(schemas[kind], name, least), length), length)
        for kind, pool in state.items()
        for name, _ in _leaves(pool)
    }


def read_rows(cache: KVCache, slot: int, least: int, length: int) -> dict[str, np.ndarray]:
    """Those rows of one slot, by name: arrays (L, rows, ...), oldest first. O(the slot's state)."""
    ranges = row_ranges({k: s.schema for k, s in cache.state.items()}, cache.state, least, length)
    leaves = {f"{kind}.{name}": x for kind, pool in cache.state.items() for name, x in _leaves(pool)}
    return read_slot_rows(leaves, slot, ranges)


def write_rows(cache: KVCache, slot: int, rows: dict[str, np.ndarray], length: int) -> KVCache:
    """The cache in which a slot's state is these rows, which end at position length - 1, and zeros. Donates the state.

    Where ring or tail have fewer rows, the newest count. No rows at all: everything is zero.
    """

    def place(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        x = np.zeros(shape.shape, shape.dtype)
        kind, name = path[0].key, ".".join(p.name for p in path[1:])
        if not rows:
            return np.full_like(x, -1) if name == "ring.pos" else x
        if name in _DERIVED:
            ring_rows = cache.state[kind].schema.ring_rows
            if name == "ring.head":
                return np.full_like(x, length % ring_rows)
            first = length - min(rows[f"{kind}.ring.nope"].shape[1], ring_rows)
            x = np.full_like(x, -1)
            positions = np.arange(first, length, dtype=x.dtype)
            x[:, positions % ring_rows] = positions
            return x
        stored = rows[f"{kind}.{name}"]
        n = min(stored.shape[1], x.shape[1])
        x[:, np.arange(length - n, length) % x.shape[1]] = stored[:, stored.shape[1] - n :]
        return x

    return write_slot(cache, slot, jax.tree_util.tree_map_with_path(place, slot_shapes(cache)))


def _leaves(pool: StateCachePool) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(pool):
        name = ".".join(p.name for p in path)
        if name not in _DERIVED:
            yield name, leaf
