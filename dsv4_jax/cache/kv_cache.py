"""The whole cache as one pytree of a few large arrays."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .new_blocks import NewBlocks
from .paged_cache import PagedKVPool
from .schema import CacheSchema
from .serialisation import schema_from_json, schema_to_json, serialisable
from .state_cache import StateCachePool

Array = jax.Array

RAN_STEPS = 64
"""Of how many of the newest steps the cache knows that they ran."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "paged", "block_table", "ran"],
    meta_fields=["schemas", "layers"],
)
@dataclass(frozen=True)
class KVCache:
    """Cache of every layer: per kind ("swa", "csa", "hca"; those the model has), arrays stacked over its layers.

    The number of arrays does not grow with the layers, which is what makes a jitted step cheap to call.
    """

    state: dict[str, StateCachePool]  # stacked over the layers of the kind
    paged: dict[str, PagedKVPool]  # "csa", "hca"
    block_table: dict[str, Array]  # "csa", "hca": (R, blocks of a request) int32, -1 where no block is given
    ran: Array  # (1 + RAN_STEPS,) int32: how many steps ran, then the numbers of the newest, that of step i at i mod 64
    schemas: tuple[CacheSchema, ...]  # one a layer
    layers: tuple[int, ...]  # index of each layer within its kind
    _entered = ()  # the arrays that `with_blocks` entered last, so that entering them again costs nothing

    @classmethod
    def allocate(
        cls, schemas: tuple[CacheSchema, ...], max_requests: int, num_blocks: dict[str, int], max_blocks: dict[str, int]
    ) -> "KVCache":
        """An empty cache.

        Args:
          schemas: of every layer, in order.
          max_requests: slots.
          num_blocks: by kind, physical blocks of a layer.
          max_blocks: by kind, blocks of a request at most.

        Returns:
          The cache.
        """
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
        return self._with(state={**self.state, kind: self.state[kind].replace(**arrays)})

    def with_paged(self, kind: str, **arrays) -> "KVCache":
        """This cache with other arrays in the pool of one kind."""
        return self._with(paged={**self.paged, kind: self.paged[kind].replace(**arrays)})

    def replace_state(
        self, state: dict[str, StateCachePool], paged: dict[str, PagedKVPool], block_table: dict[str, Array]
    ) -> "KVCache":
        """This cache with other arrays throughout."""
        return replace(self, state=state, paged=paged, block_table=block_table)

    def replace_tables(self, block_table: dict[str, Array]) -> "KVCache":
        """This cache with other block tables."""
        return replace(self, block_table=block_table)

    def with_blocks(self, new_blocks: Mapping[str, Array | np.ndarray]) -> "KVCache":
        """This cache with blocks entered in its tables.

        A handle does this for its plan; doing it more than once changes nothing. From a plan's blocks the cache also
        takes the plan's number.

        Args:
          new_blocks: by kind (n, 3) int32 rows (slot, column, block). A row with a slot or column out of range is
            padding and changes nothing; block -1 takes an entry out.

        Returns:
          The cache with its tables changed.
        """
        arrays = (new_blocks.rows,) if isinstance(new_blocks, NewBlocks) else tuple(new_blocks.values())
        if not arrays or (len(arrays) == len(self._entered) and all(map(operator.is_, arrays, self._entered))):
            return self
        table = dict(self.block_table)
        for kind, rows in new_blocks.items():
            slot, column, block = rows[:, 0], rows[:, 1], rows[:, 2]
            slot = jnp.where((slot >= 0) & (column >= 0), slot, table[kind].shape[0])
            table[kind] = table[kind].at[slot, column].set(block, mode="drop")
        ran = _with_number(self.ran, new_blocks.number) if isinstance(new_blocks, NewBlocks) else self.ran
        entered = replace(self, block_table=table, ran=ran)
        object.__setattr__(entered, "_entered", arrays)
        return entered

    def _with(self, **arrays) -> "KVCache":
        """This cache with other arrays in place of those that hold no blocks' places."""
        other = replace(self, **arrays)
        object.__setattr__(other, "_entered", self._entered)
        return other


def _with_number(ran: Array, number: Array | np.ndarray) -> Array:
    """`KVCache.ran` with one step more, unless it is the newest already or has no number."""
    count = ran[0]
    new = (number > 0) & (ran[1 + (count - 1) % RAN_STEPS] != number)
    cell = jnp.where(new, jnp.stack([jnp.zeros_like(count), 1 + count % RAN_STEPS]), ran.shape[0])
    return ran.at[cell].set(jnp.stack([count + 1, jnp.asarray(number, jnp.int32)]), mode="drop")


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
        ran=jnp.zeros(1 + RAN_STEPS, jnp.int32),
        schemas=schemas,
        layers=tuple(layers),
    )
