"""Paged pools: the compressed entries of CSA and HCA layers, and the CSA indexer's keys."""

import jax
import jax.numpy as jnp

from ..ops.formats.fp4 import GROUP_SIZE
from ..ops.formats.record import Record
from ..ops.write.compress import IndexerKeys
from .counts import count
from .formats import allocate_keys, record_format
from .schema import CacheSchema
from .stacks import take_layer

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
class PagedKVPool:
    """Blocks of one layer, or of all layers of a kind stacked on a leading axis.

    N blocks of E entries (CSA 32, HCA 1 in the released models). A pytree whose leaves are the arrays of `entries` and
    `indexer`; the schema is static.
    """

    def __init__(self, schema: CacheSchema, num_blocks: int, num_layers: int | None = None):
        """Zero-filled pool of `num_blocks` blocks, stacked over `num_layers` if given.

        Raises ValueError for a schema without entries (SWA) or a negative number of blocks.
        """
        if not schema.entries_per_block:
            raise ValueError(f"a {schema.kind.upper()} layer has no entries: a paged pool is for CSA and HCA layers")
        num_blocks = count("num_blocks", num_blocks)
        lead = () if num_layers is None else (num_layers,)
        shape = (*lead, num_blocks, schema.entries_per_block)
        self.schema = schema
        self.entries: Record = record_format(schema.cache_dtype).allocate(shape, schema.nope_dim, schema.rope_dim)
        self.indexer: IndexerKeys | None = None
        if schema.indexer_entries_per_block:
            self.indexer = allocate_keys(schema.indexer_dtype, shape, schema.index_head_dim)

    @property
    def num_blocks(self) -> int:
        """Physical blocks of a layer."""
        return self.entries.nope.shape[-3]

    @property
    def entries_fp8(self) -> Array | None:
        """([L,] N, E, head_dim - rope_dim) uint8, E4M3 bits; None when the entries are stored exactly."""
        return self.entries.nope if self.entries.nope.dtype == jnp.uint8 else None

    @property
    def entries_rope(self) -> Array:
        """([L,] N, E, rope_dim) bfloat16 (float32 in the "fp32" format)."""
        return self.entries.rope

    @property
    def inv_scale(self) -> Array | None:
        """([L,] N, E) float32, factor of the stored values ("fp8_ue8m0": (…, 8) uint8); None if stored exactly."""
        return self.entries.inv_scale

    @property
    def indexer_keys_fp4(self) -> Array | None:
        """([L,] N, E, index_head_dim / 2) uint8, two E2M1 codes a byte; None for HCA or exact keys."""
        if self.indexer is None or self.schema.indexer_dtype not in GROUP_SIZE:
            return None
        return self.indexer.keys

    @property
    def indexer_scale(self) -> Array | None:
        """([L,] N, E, groups) uint8, E4M3 ("nvfp4") or E8M0 ("mxfp4"); None for HCA or exact keys."""
        return None if self.indexer is None else self.indexer.scale

    def replace(self, *, entries: Record | None = None, indexer: IndexerKeys | None = None) -> "PagedKVPool":
        """This pool with other arrays."""
        return _pool(self.schema, entries or self.entries, indexer or self.indexer)

    def layer(self, index: int | Array) -> "PagedKVPool":
        """One layer of a stacked pool."""
        return take_layer(self, index)

    def memory_bytes(self) -> int:
        """Bytes the arrays hold."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def tree_flatten_with_keys(self):
        """Leaves by name; the schema is static."""
        key = jax.tree_util.GetAttrKey
        return ((key("entries"), self.entries), (key("indexer"), self.indexer)), self.schema

    @classmethod
    def tree_unflatten(cls, schema, children):
        """Inverse of tree_flatten_with_keys."""
        return _pool(schema, *children)


def _pool(schema: CacheSchema, entries: Record, indexer: IndexerKeys | None) -> PagedKVPool:
    pool = object.__new__(PagedKVPool)
    pool.schema, pool.entries, pool.indexer = schema, entries, indexer
    return pool
