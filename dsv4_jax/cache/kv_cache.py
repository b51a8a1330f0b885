"""The whole cache as one pytree of a few large arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .paged_cache import PagedKVPool
from .schema import CacheSchema
from .serialisation import schema_from_json, schema_to_json, serialisable
from .state_cache import StateCachePool

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass, data_fields=["state", "paged", "block_table"], meta_fields=["schemas", "layers"]
)
@dataclass(frozen=True)
class KVCache:
    """Cache of every layer: per kind ("swa", "csa", "hca"; those the model has), arrays stacked over its layers.

    The number of arrays does not grow with the layers, which is what makes a jitted step cheap to call.
    """

    state: dict[str, StateCachePool]  # stacked over the layers of the kind
    paged: dict[str, PagedKVPool]  # "csa", "hca"
    block_table: dict[str, Array]  # "csa", "hca": (R, blocks of a request) int32, -1 where no block is given
    schemas: tuple[CacheSchema, ...]  # one a layer
    layers: tuple[int, ...]  # index of each layer within its kind

    @classmethod
    def allocate(
        cls, schemas: tuple[CacheSchema, ...], max_requests: int, num_blocks: dict[str, int], max_blocks: dict[str, int]
    ) -> "KVCache":
        """Empty cache: `num_blocks` physical blocks a layer and `max_blocks` blocks a request at most, by kind."""
        return _allocate(tuple(schemas), max_requests, tuple(num_blocks.items()), tuple(max_blocks.items()))

    @property
    def max_requests(self) -> int:
        """Slots."""
        return next(iter(self.state.values())).max_requests

    def memory_bytes(self) -> int:
        """Bytes all arrays hold."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def with_state(self, kind: str, **arrays) -> "KVCache":
        """This cache with other arrays in the state of one kind."""
        return replace(self, state={**self.state, kind: self.state[kind].replace(**arrays)})

    def with_paged(self, kind: str, **arrays) -> "KVCache":
        """This cache with other arrays in the pool of one kind."""
        return replace(self, paged={**self.paged, kind: self.paged[kind].replace(**arrays)})

    def replace_state(
        self, state: dict[str, StateCachePool], paged: dict[str, PagedKVPool], block_table: dict[str, Array]
    ) -> "KVCache":
        """This cache with other arrays throughout."""
        return replace(self, state=state, paged=paged, block_table=block_table)

    def replace_tables(self, block_table: dict[str, Array]) -> "KVCache":
        """This cache with other block tables."""
        return replace(self, block_table=block_table)

    def with_blocks(self, new_blocks: Mapping[str, Array | np.ndarray]) -> "KVCache":
        """This cache with blocks entered in its tables: by kind (n, 3) int32 rows (slot, column, block).

        A row with a slot or column out of range is padding and changes nothing; block -1 takes an entry out.
        """
        table = dict(self.block_table)
        for kind, rows in new_blocks.items():
            slot, column, block = rows[:, 0], rows[:, 1], rows[:, 2]
            slot = jnp.where((slot >= 0) & (column >= 0), slot, table[kind].shape[0])
            table[kind] = table[kind].at[slot, column].set(block, mode="drop")
        return self.replace_tables(table)


serialisable(StateCachePool, schema_to_json, schema_from_json)
serialisable(PagedKVPool, schema_to_json, schema_from_json)
serialisable(
    KVCache,
    lambda static: [[schema_to_json(schema) for schema in static[0]], static[1]],
    lambda stored: (tuple(schema_from_json(fields) for fields in stored[0]), tuple(stored[1])),
)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _allocate(
    schemas: tuple[CacheSchema, ...],
    max_requests: int,
    num_blocks: tuple[tuple[str, int], ...],
    max_blocks: tuple[tuple[str, int], ...],
) -> KVCache:
    """See `KVCache.allocate`. One program makes all arrays; one for each takes three times as long to compile."""
    count: dict[str, int] = {}
    layers: list[int] = []
    first: dict[str, CacheSchema] = {}
    for schema in schemas:
        layers.append(count.get(schema.kind, 0))
        count[schema.kind] = layers[-1] + 1
        if first.setdefault(schema.kind, schema) != schema:
            raise ValueError(f"layers of kind {schema.kind} differ: {first[schema.kind]} and {schema}")
    blocks, columns = dict(num_blocks), dict(max_blocks)
    paged = {k: PagedKVPool(s, blocks[k], count[k]) for k, s in first.items() if s.entries_per_block}
    return KVCache(
        state={k: StateCachePool(s, max_requests, count[k]) for k, s in first.items()},
        paged=paged,
        block_table={k: jnp.full((max_requests, columns[k]), -1, jnp.int32) for k in paged},
        schemas=schemas,
        layers=tuple(layers),
    )
