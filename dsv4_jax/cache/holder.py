"""The cache between steps, and everything that the host writes to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .host.blocks import rows_array
from .kv_cache import KVCache
from .paged_cache import PagedKVPool
from .stacks import LayerViews
from .state_cache import StateCachePool
from .transfer.debug import fill_blocks, fill_slot
from .transfer.slots import copy_slot, enter_cells
from .transfer.snapshot import Snapshot, write_entries
from .transfer.state_rows import write_rows

Rows = dict[str, list[tuple[int, int, int]]]
"""By kind, places in the block tables and what they hold: (slot, column, block)."""


class CacheHolder:
    """Holds the pytree. Writes donate it, and what they return is assigned at once, so that a failure loses nothing.

    Attributes:
      cache: the pytree, which a step may have been donated.
      debug_nan: whether free blocks and slots are kept unreadable (`transfer/debug.py`).
    """

    def __init__(self, cache: KVCache, *, debug_nan: bool):
        self.cache, self.debug_nan = cache, debug_nan

    def emptied(self) -> "CacheHolder":
        """A holder of an empty cache of the same sizes."""
        cache = self.cache
        fresh = KVCache.allocate(
            cache.schemas,
            cache.max_requests,
            {kind: pool.num_blocks for kind, pool in cache.paged.items()},
            {kind: table.shape[1] for kind, table in cache.block_table.items()},
        )
        return CacheHolder(fresh, debug_nan=self.debug_nan)

    def require_same_size(self, cache: Any) -> None:
        """ValueError unless `cache` may take the place of the one that is held."""
        if not isinstance(cache, KVCache) or self._size(cache) != self._size(self.cache):
            what = "a cache of another size or form" if isinstance(cache, KVCache) else f"a {type(cache).__name__}"
            raise ValueError(f"manager.cache got {what}: expected the cache that its step returned")

    @staticmethod
    def _size(cache: KVCache) -> tuple[Any, ...]:
        return cache.ran.shape, *cache_size(cache)

    @property
    def is_donated(self) -> bool:
        """Whether a step took the arrays, and its result was not assigned yet."""
        return any(x.is_deleted() for x in jax.tree.leaves(self.cache))

    def live(self) -> KVCache:
        """The cache; RuntimeError where it was donated."""
        if self.is_donated:
            raise RuntimeError("the cache was donated to a step whose result was not assigned to manager.cache yet")
        return self.cache

    def ran(self, *, wait: bool) -> np.ndarray | None:
        """Which steps ran (`KVCache.ran`); None where the cache cannot say, or could not without waiting."""
        ran: Any = self.cache.ran
        try:
            return np.array(ran) if not self.is_donated and (wait or ran.is_ready()) else None
        except RuntimeError:  # the step that it comes from failed
            return None

    def pool(self, layer_idx: int) -> PagedKVPool | None:
        """The pool of one layer, None for SWA."""
        cache = self.live()
        kind = cache.schemas[layer_idx].kind
        return cache.paged[kind].layer(cache.layers[layer_idx]) if kind in cache.paged else None

    def state(self, layer_idx: int) -> StateCachePool:
        """Ring and tails of one layer."""
        cache = self.live()
        return cache.state[cache.schemas[layer_idx].kind].layer(cache.layers[layer_idx])

    @property
    def pools(self) -> LayerViews:
        """`pool` of every layer."""
        return LayerViews(len(self.cache.schemas), self.pool)

    @property
    def states(self) -> LayerViews:
        """`state` of every layer."""
        return LayerViews(len(self.cache.schemas), self.state)

    # Writes.

    def enter(self, rows: Rows) -> None:
        """Enters rows in the block tables."""
        self.cache = enter_cells(self.cache, rows)

    def write_state(self, slot: int, rows: dict[str, np.ndarray], length: int) -> None:
        """Ring and tails of a slot hold these rows, which end before position `length`, and nothing else."""
        self.cache = write_rows(self.cache, slot, rows, length)

    def write_snapshot(self, slot: int, snapshot: Snapshot, blocks: dict[str, list[int]]) -> None:
        """A slot and its blocks hold what a snapshot does."""
        for cache in write_entries(self.cache, snapshot, blocks):
            self.cache = cache
        self.write_state(slot, snapshot.arrays, snapshot.length)

    def copy(self, slot: int, target: int, copies: dict[str, list[tuple[int, int]]], most: int) -> None:
        """Slot `target` holds what `slot` does. copies: pairs of blocks by kind, padded to `most`; see `copy_slot`."""
        pairs = {kind: jnp.asarray(rows_array(rows, most, 2)) for kind, rows in copies.items()}
        self.cache = copy_slot(self.cache, jnp.int32(slot), jnp.int32(target), pairs)

    def make_unreadable(self, blocks: Mapping[str, Sequence[int]], slots: Sequence[int]) -> None:
        """With `debug_nan`, fills free blocks and slots with NaN."""
        if self.debug_nan:
            for cache in fill_blocks(self.cache, blocks):
                self.cache = cache
            for slot in slots:
                self.cache = fill_slot(self.cache, slot)


def cache_size(cache: KVCache) -> tuple[Any, ...]:
    """What the shapes of all arrays follow from; asked for in every step, so without looking at each."""
    tables = [table.shape for table in cache.block_table.values()]
    return cache.schemas, cache.max_requests, tables, [pool.num_blocks for pool in cache.paged.values()]
