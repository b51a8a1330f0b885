"""How many bytes a cache takes, and how large a cache a number of bytes holds.

The sizes are those of `KVCache.allocate`, which is asked for its shapes; everything in it is proportional to requests
or to blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .counts import count
from .kv_cache import RAN_STEPS, KVCache
from .schema import KINDS, CacheSchema, build_schema

FIXED_BYTES = 4 * (1 + RAN_STEPS)
"""Of a cache of any size: the numbers of the steps that ran."""


@dataclass(frozen=True)
class KindCost:
    """Bytes of all layers of one kind together."""

    schema: CacheSchema
    layers: int
    ring: int  # of a request: its window ring
    tails: int  # of a request: tokens that wait to be compressed
    block: int  # of a physical block: entries and indexer keys; 0 for SWA
    table_column: int  # of a request, for each block it may own: its place in the block table

    @property
    def kind(self) -> str:
        """ "swa" | "csa" | "hca"."""
        return self.schema.kind

    @property
    def per_token(self) -> float:
        """Growing bytes per token of context."""
        return self.block / self.schema.block_size


@dataclass(frozen=True)
class CacheSize:
    """How large a cache is made: what `KVCacheManager` takes."""

    requests: int
    max_context_len: int  # tokens of one request at most
    num_blocks: dict[str, int]  # by kind, "csa" and "hca"; the layers of a kind have as many each
    total_bytes: int


@dataclass(frozen=True)
class CacheCost:
    """What the cache of a model costs: bytes by kind of layer, those the model has."""

    kinds: tuple[KindCost, ...]

    @property
    def per_request(self) -> int:
        """Fixed bytes of a request, whatever its length: rings and tails."""
        return sum(k.ring + k.tails for k in self.kinds)

    @property
    def per_token(self) -> float:
        """Growing bytes per token of context."""
        return sum(k.per_token for k in self.kinds)

    def blocks_for(self, num_tokens: int) -> dict[str, int]:
        """Blocks that a request of `num_tokens` tokens owns, by kind."""
        return {k.kind: k.schema.blocks_for(num_tokens) for k in self.kinds if k.block}

    def table_bytes(self, requests: int, max_context_len: int) -> int:
        """Bytes of the block tables, and of the numbers of the newest steps."""
        columns = self.blocks_for(max_context_len)
        return requests * sum(k.table_column * max(columns[k.kind], 1) for k in self.kinds if k.block) + FIXED_BYTES

    def total_bytes(self, requests: int, max_context_len: int, num_blocks: dict[str, int]) -> int:
        """Bytes of a cache with that many slots and physical blocks, to the byte."""
        blocks = sum(k.block * num_blocks[k.kind] for k in self.kinds if k.block)
        return requests * self.per_request + self.table_bytes(requests, max_context_len) + blocks

    def size(self, requests: int, max_context_len: int) -> CacheSize:
        """The cache in which every request can have `max_context_len` tokens at once; ValueError for absurd numbers."""
        for name, value in (("max_concurrent_requests", requests), ("max_context_len", max_context_len)):
            count(name, value, least=1, most=(1 << 31) - 1)  # slots and positions are int32
        blocks = {kind: requests * n for kind, n in self.blocks_for(max_context_len).items()}
        return CacheSize(requests, max_context_len, blocks, self.total_bytes(requests, max_context_len, blocks))

    def largest_context(self, memory: int, requests: int, limit: int) -> int:
        """Most tokens, up to `limit`, that every one of `requests` can have at once in `memory` bytes; 0 for none."""
        return _largest(lambda n: not n or self.size(requests, n).total_bytes <= memory, limit)

    def largest_concurrency(self, memory: int, max_context_len: int) -> int:
        """Most requests of `max_context_len` tokens that `memory` bytes hold at once; 0 for none."""
        return max(memory - FIXED_BYTES, 0) // (self.size(1, max_context_len).total_bytes - FIXED_BYTES)

    def fill(self, memory: int, requests: int, max_context_len: int) -> CacheSize:
        """The cache with as many blocks as `memory` bytes hold, and no more than all requests can use.

        The pools suffice for at least one request of `max_context_len` tokens; shorter ones share them. Raises
        ValueError when `memory` is too small for that; the sentence says what is missing and what would fit.
        """
        full = self.size(requests, max_context_len)
        if full.total_bytes <= memory:
            return full
        least = self.blocks_for(max_context_len)

        def filled(n: int) -> CacheSize:  # a block of every kind covers the same tokens: the pools grow together
            blocks = {kind: min(max(n, least[kind]), full.num_blocks[kind]) for kind in least}
            return CacheSize(requests, max_context_len, blocks, self.total_bytes(requests, max_context_len, blocks))

        missing = filled(0).total_bytes - memory
        if missing > 0:
            whose = "one request" if requests == 1 else f"{requests} concurrent requests, one of them"
            raise ValueError(
                f"{memory:,} bytes are {missing:,} too few for a cache of {whose} with {max_context_len:,} "
                f"token{'s' * (max_context_len != 1)}: {self._what_fits(memory, requests, max_context_len)}"
            )
        return filled(_largest(lambda n: filled(n).total_bytes <= memory, max(full.num_blocks.values(), default=0)))

    def _what_fits(self, memory: int, requests: int, max_context_len: int) -> str:
        context = self.largest_context(memory, requests, max_context_len)
        concurrency = self.largest_concurrency(memory, max_context_len)
        pairs = [pair for pair in ((requests, context), (concurrency, max_context_len)) if all(pair)]
        fits = [f"{n} request{'s' * (n != 1)} of {tokens:,} tokens" for n, tokens in pairs]
        smallest = self.size(1, 1).total_bytes
        return " or ".join(fits) + " would fit" if fits else f"the smallest cache takes {smallest:,}"


def cache_cost(config: Any, schedule: Sequence[Any], **options: Any) -> CacheCost:
    """What the cache of a model takes.

    Args:
      config: the model: a DSV4Config or a CacheGeometry.
      schedule: its layers, `build_schedule(config)`.
      **options: cache_dtype, indexer_dtype, max_rollback and hca_tail, as for `build_schema`.

    Returns:
      Bytes by kind of layer, and the sizes that a memory holds.

    Raises:
      ValueError: as `build_schema`.
    """
    schemas = tuple(build_schema(config, spec, **options) for spec in schedule)
    one = dict.fromkeys((s.kind for s in schemas), 1)
    cache = jax.eval_shape(lambda: KVCache.allocate(schemas, 1, one, one))
    return CacheCost(
        tuple(
            KindCost(
                schema=next(s for s in schemas if s.kind == kind),
                layers=sum(s.kind == kind for s in schemas),
                ring=_bytes(cache.state[kind].ring),
                tails=_bytes((cache.state[kind].tail, cache.state[kind].indexer_tail)),
                block=_bytes(cache.paged.get(kind)),
                table_column=_bytes(cache.block_table.get(kind)),
            )
            for kind in KINDS
            if kind in one
        )
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n from 0 to limit that fits; if n fits, less does, and 0 does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
