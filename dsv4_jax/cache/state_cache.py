"""State pools: what a running request holds at a fixed size, its window ring and its uncompressed tails."""

import jax
import jax.numpy as jnp

from ..ops.write.append_swa import SWARing
from ..ops.write.compressor_tail import CompressorTail
from ..ops.write.running_tail import RunningTail
from .counts import count
from .formats import record_format
from .schema import CacheSchema
from .stacks import take_layer

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
class StateCachePool:
    """One row per slot, of one layer or of all layers of a kind stacked on a leading axis.

    R slots, W ring rows (window + max_rollback). The place of everything follows from (slot, position): ring row =
    position mod W, tail row = position mod the tail's rows. A pytree; the schema is static.
    """

    def __init__(self, schema: CacheSchema, max_requests: int, num_layers: int | None = None):
        """Empty state of `max_requests` slots, stacked over `num_layers` if given; ValueError for no slot."""
        max_requests = count("max_requests", max_requests, least=1)
        lead = (max_requests,) if num_layers is None else (num_layers, max_requests)
        record = record_format(schema.cache_dtype).allocate((*lead, schema.ring_rows), schema.nope_dim, schema.rope_dim)
        self.schema = schema
        self.ring = SWARing(
            *record, pos=jnp.full((*lead, schema.ring_rows), -1, jnp.int32), head=jnp.zeros(lead, jnp.int32)
        )
        self.tail: CompressorTail | RunningTail | None = None
        self.indexer_tail: CompressorTail | None = None
        if schema.running_tail:
            self.tail = RunningTail(jnp.zeros((*lead, schema.running_tail_rows, 5, schema.head_dim), jnp.float32))
        elif schema.compress_ratio:
            self.tail = _empty_tail(schema, lead, schema.head_dim)
        if schema.indexer_entries_per_block:
            self.indexer_tail = _empty_tail(schema, lead, schema.index_head_dim)

    @property
    def max_requests(self) -> int:
        """Slots."""
        return self.ring.head.shape[-1]

    @property
    def swa_fp8(self) -> Array | None:
        """([L,] R, W, head_dim - rope_dim) uint8, E4M3 bits; None when records are stored exactly."""
        return self.ring.nope if self.ring.nope.dtype == jnp.uint8 else None

    @property
    def swa_rope(self) -> Array:
        """([L,] R, W, rope_dim) bfloat16 (float32 in the "fp32" format)."""
        return self.ring.rope

    @property
    def swa_inv_scale(self) -> Array | None:
        """([L,] R, W) float32 ("fp8_ue8m0": (…, 8) uint8); None when records are stored exactly."""
        return self.ring.inv_scale

    @property
    def swa_pos(self) -> Array:
        """([L,] R, W) int32: position a row was last written for, -1 for none. Readers do not look at it."""
        return self.ring.pos

    @property
    def swa_head(self) -> Array:
        """([L,] R) int32: ring row after the newest that was written; a rollback or release does not move it."""
        return self.ring.head

    @property
    def tail_ka(self) -> Array | None:
        """([L,] R, rows, head_dim) float32, lane a of wkv: ratio - 1 rows, with overlap 2 * ratio - 1, and max_rollback
        more, at least one; None for SWA and for a running tail."""
        return getattr(self.tail, "ka", None)

    @property
    def tail_za(self) -> Array | None:
        """As tail_ka, of wgate + ape."""
        return getattr(self.tail, "za", None)

    @property
    def tail_kb(self) -> Array | None:
        """([L,] R, rows, head_dim) float32, lane b of wkv: ratio - 1 rows and as many more as lane a has; CSA only."""
        return getattr(self.tail, "kb", None)

    @property
    def tail_zb(self) -> Array | None:
        """As tail_kb, of wgate + ape."""
        return getattr(self.tail, "zb", None)

    @property
    def tail_sums(self) -> Array | None:
        """([L,] R, rows, 5, head_dim) float32, the sums of a running HCA tail (`RunningTail`); None elsewhere."""
        return getattr(self.tail, "sums", None)

    @property
    def tail_len(self) -> Array | None:
        """([L,] R) int32: tokens that wait for their window to fill, as of the slot's last write; None for SWA.

        A rollback or release is the host's alone: what was written stays until it is written over, out of sight.
        """
        if self.tail is None:
            return None
        newest = jnp.expand_dims((self.ring.head - 1) % self.schema.ring_rows, -1)
        return (jnp.take_along_axis(self.ring.pos, newest, axis=-1)[..., 0] + 1) % self.schema.compress_ratio

    def reset_slot(self, slot: int | Array) -> "StateCachePool":
        """The state with `slot` marked as never written (positions -1, head 0); its vectors stay, out of sight.

        Raises ValueError for a number out of range; an array () int32, as inside jit, then changes nothing.
        """
        if isinstance(slot, Array):
            slot = jnp.where(slot >= 0, slot, self.max_requests)
        else:
            slot = count("slot", slot, most=self.max_requests - 1)
        ring = self.ring
        pos = ring.pos.at[..., slot, :].set(-1, mode="drop")
        return self.replace(ring=ring._replace(pos=pos, head=ring.head.at[..., slot].set(0, mode="drop")))

    def replace(
        self,
        *,
        ring: SWARing | None = None,
        tail: CompressorTail | RunningTail | None = None,
        indexer_tail: CompressorTail | None = None,
    ) -> "StateCachePool":
        """This state with other arrays."""
        return _state(self.schema, ring or self.ring, tail or self.tail, indexer_tail or self.indexer_tail)

    def layer(self, index: int | Array) -> "StateCachePool":
        """One layer of a stacked state."""
        return take_layer(self, index)

    def memory_bytes(self) -> int:
        """Bytes the arrays hold."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def tree_flatten_with_keys(self):
        """Leaves by name; the schema is static."""
        key = jax.tree_util.GetAttrKey
        children = ((key("ring"), self.ring), (key("tail"), self.tail), (key("indexer_tail"), self.indexer_tail))
        return children, self.schema

    @classmethod
    def tree_unflatten(cls, schema, children):
        """Inverse of tree_flatten_with_keys."""
        return _state(schema, *children)


def _empty_tail(schema: CacheSchema, lead: tuple[int, ...], dim: int) -> CompressorTail:
    def rows(n: int) -> Array:
        return jnp.zeros((*lead, n, dim), jnp.float32)

    if not schema.overlap:
        return CompressorTail(rows(schema.tail_rows), rows(schema.tail_rows), None, None)
    long, short = schema.overlap_tail_rows, schema.tail_rows
    return CompressorTail(rows(long), rows(long), rows(short), rows(short))


def _state(schema: CacheSchema, ring: SWARing, tail, indexer_tail) -> StateCachePool:
    state = object.__new__(StateCachePool)
    state.schema, state.ring, state.tail, state.indexer_tail = schema, ring, tail, indexer_tail
    return state
