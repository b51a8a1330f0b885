"""A layer's view of the cache inside a step: what a model writes to and reads from."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..ops.formats.record import Record, decode_record, encode_record
from ..ops.nn.rms_norm import rms_norm
from ..ops.nn.rope import apply_rope
from ..ops.read.attend import RawQuery, attend
from ..ops.read.entries import read_entries, read_keys
from ..ops.read.select import select
from ..ops.read.window import read_window
from ..ops.segments import Segments, StepTokens, per_token, to_segments
from ..ops.write.append_swa import SWARing, append_swa
from ..ops.write.append_swa_fused import RawWindow, append_swa_fused
from ..ops.write.compress import CompressorWeights, Projections, compress, compress_indexer
from ..ops.write.ordering import after as ordered_after
from ..ops.write.write_layer import LayerInputs, LayerState, write_layer
from .kv_cache import KVCache
from .layer_inputs import (
    FLOATS,
    check_array,
    check_floating,
    check_number,
    check_raw,
    check_rows,
    check_weights,
    layer_number,
)
from .paged_cache import PagedKVPool
from .plan import StepPlan
from .schema import CacheSchema
from .state_cache import StateCachePool
from .views import ClassicalView, IndexerView, SWAView

Array = jax.Array
T = TypeVar("T")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class LayerCacheHandle:
    """(cache, plan, layer index): making one allocates nothing; a write returns a new handle.

    The index is an integer, or a traced one, () int32, as in `lax.scan` over layers of one kind; then `kind` says which
    ("swa", "csa", "hca"), unless the cache has one alone. A traced index of another kind's layer, or out of range,
    writes nothing and reads as padding does.

    The plan's new blocks are entered in the cache's tables, unless they are already (`KVCache.with_blocks`).

    A decode step writes its token, then reads the window. A step with several tokens of a slot overwrites ring rows
    that its own first tokens still need: it reads first (`read_swa_view(kv)`) and writes after
    (`write_swa(kv, after=output)`), which keeps the update in place. Writing first is right too (the handle keeps what
    is needed), but may cost a copy of the ring.
    """

    cache: KVCache
    plan: StepPlan
    layer_idx: int | Array
    pending: SWAView | None = None  # the window as of a multi-token write
    unallocated: str | None = None  # why entries cannot be written, known when the host made the plan
    kind: str | None = None  # of a traced layer

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_idx", layer_number(self.layer_idx, len(self.cache.schemas)))
        known = isinstance(self.layer_idx, int)
        kinds = {self.cache.schemas[self.layer_idx].kind} if known else set(self.cache.state)
        if (self.kind is None and len(kinds) > 1) or self.kind not in (None, *kinds):
            raise ValueError(
                f"layer {self._name}: kind is {self.kind!r}, expected one of {', '.join(sorted(kinds))}, "
                "the layers that this index stands for"
            )
        object.__setattr__(self, "kind", self.kind or kinds.pop())
        object.__setattr__(self, "cache", self.cache.with_blocks(self.plan.new_blocks))

    def tree_flatten_with_keys(self):
        """Leaves by name; an integer as the index is static, a traced one a leaf."""
        key, is_static = jax.tree_util.GetAttrKey, isinstance(self.layer_idx, int)
        index = None if is_static else self.layer_idx
        children = {"cache": self.cache, "plan": self.plan, "pending": self.pending, "layer_idx": index}
        static = (self.layer_idx if is_static else None, self.unallocated, self.kind)
        return tuple((key(name), child) for name, child in children.items()), static

    @classmethod
    def tree_unflatten(cls, static, children):
        """Inverse of tree_flatten_with_keys."""
        handle = object.__new__(cls)
        cache, plan, pending, index = children
        number, unallocated, kind = static
        values = (cache, plan, index if number is None else number, pending, unallocated, kind)
        for field, value in zip(fields(cls), values, strict=True):
            object.__setattr__(handle, field.name, value)
        return handle

    @property
    def schema(self) -> CacheSchema:
        """Geometry of this layer."""
        if isinstance(self.layer_idx, int):
            return self.cache.schemas[self.layer_idx]
        return next(schema for schema in self.cache.schemas if schema.kind == self.kind)

    @property
    def state(self) -> StateCachePool:
        """This layer's ring and tails (a slice of the stack)."""
        return self.cache.state[self.schema.kind].layer(self._index)

    @property
    def paged(self) -> PagedKVPool | None:
        """This layer's pool (a slice of the stack); None for an SWA layer."""
        if self.schema.kind not in self.cache.paged:
            return None
        return self.cache.paged[self.schema.kind].layer(self._index)

    @property
    def _name(self) -> object:
        """The layer, in a sentence."""
        return self.layer_idx if isinstance(self.layer_idx, int) else f"(traced, of kind {self.kind})"

    @property
    def _in_kind(self) -> Array:
        """A traced layer's index among those of its kind, -1 where it is none of them."""
        of_kind = [i if s.kind == self.kind else -1 for s, i in zip(self.cache.schemas, self.cache.layers, strict=True)]
        index = jnp.where(self.layer_idx >= 0, self.layer_idx, len(of_kind)).astype(jnp.int32)
        return jnp.asarray(of_kind, jnp.int32).at[index].get(mode="fill", fill_value=-1)

    @property
    def _index(self) -> int | Array:
        """Of the layer in the stacks of its kind."""
        if isinstance(self.layer_idx, int):
            return self.cache.layers[self.layer_idx]
        return jnp.maximum(self._in_kind, 0)

    @property
    def _state(self) -> StateCachePool:
        """State of all layers of the kind."""
        return self.cache.state[self.schema.kind]

    @property
    def _pool(self) -> PagedKVPool | None:
        """Pool of all layers of the kind."""
        return self.cache.paged.get(self.schema.kind)

    @property
    def _slots(self) -> Array:
        slots = jnp.asarray(self.plan.slots)
        return slots if isinstance(self.layer_idx, int) else jnp.where(self._in_kind >= 0, slots, -1)

    @property
    def _segments(self) -> Segments:
        segments = self.plan.segments
        if isinstance(self.layer_idx, int):
            return segments
        return segments._replace(slots=jnp.where(self._in_kind >= 0, segments.slots, -1))

    def _check(self, name: str, x: Array, width: int) -> None:
        check_rows(self._name, name, x, self.plan.slots.shape[0], width)

    def _need(self, kind: tuple[str, ...], what: str) -> None:
        if self.schema.kind not in kind:
            raise ValueError(f"layer {self._name} is {self.schema.kind.upper()}: it has no {what}")

    # The window.

    def write_swa(self, kv: Array, *, after: Array | None = None) -> "LayerCacheHandle":
        """Stores the tokens' vectors in the window ring, at the plan's slots and positions.

        Args:
          kv: (T, head_dim) float32 | bfloat16, normed and rotated.
          after: what was computed from `read_swa_view(kv)`: the write comes after it, and so stays in place.

        Returns:
          The handle after the write.

        Raises:
          ValueError: another shape or dtype.
        """

        def append(ring: SWARing, tokens: StepTokens) -> SWARing:
            return append_swa(
                ring, kv, tokens.slots, tokens.positions, layer=self._index, one_token_per_slot=tokens.one_per_slot
            )

        self._check("kv", kv, self.schema.head_dim)
        return self._write_window(append, lambda: kv, after)

    def write_swa_fused(
        self, kv: Array, norm: Array, cos: Array, sin: Array, *, eps: float = 1e-6, after: Array | None = None
    ) -> "LayerCacheHandle":
        """As `write_swa`, of the raw output of the wkv projection: RMSNorm, RoPE and the write in one operation.

        Args:
          kv: (T, head_dim) float32 | bfloat16; normed and rotated in float32.
          norm: (head_dim,) float32, the RMSNorm weight.
          cos, sin: (T, rope_dim // 2) float32, of the tokens' positions.
          eps: of the RMSNorm.
          after: as for `write_swa`.

        Returns:
          The handle after the write.

        Raises:
          ValueError: another shape, or another dtype of kv.
          TypeError: another dtype of norm, cos or sin.
        """

        def append(ring: SWARing, tokens: StepTokens) -> SWARing:
            return append_swa_fused(ring, RawWindow(kv, norm, cos, sin), tokens, eps=eps, layer=self._index)

        def values() -> Array:
            return apply_rope(rms_norm(kv.astype(jnp.float32), norm, eps=eps), cos, sin)

        self._check("kv", kv, self.schema.head_dim)
        return self._write_window(append, values, after)

    def _write_window(
        self, append: Callable[[SWARing, StepTokens], SWARing], values: Callable[[], Array], after: Array | None
    ) -> "LayerCacheHandle":
        """append(ring, tokens), which stores values()."""
        pending, tokens = None, self._tokens
        if not self.plan.one_token_per_slot:
            if after is None:
                pending = self.read_swa_view(values())
                after = pending.kv
            tokens = tokens._replace(slots=ordered_after(tokens.slots, after))
        ring = append(self._state.ring, tokens)
        return replace(self, cache=self.cache.with_state(self.schema.kind, ring=ring), pending=pending)

    def read_swa_view(self, fresh: Array | None = None, dtype: DTypeLike = jnp.float32) -> SWAView:
        """The window of every token, the step's own tokens included.

        Args:
          fresh: (T, head_dim), the step's kv where it is not written yet; its rows follow the W rows of the ring, as
            many as a segment has tokens at most.
          dtype: of the vectors returned.

        Returns:
          Rows of every segment's ring, their positions, and which of them each token sees.

        Raises:
          ValueError: another shape or dtype of fresh, or a dtype that is not floating.
        """
        check_floating(self._name, dtype)
        if fresh is None and self.pending is not None:
            return self.pending._replace(kv=self.pending.kv.astype(dtype))
        segments = self._segments
        ring = self._state.ring
        newest = segments.starts - 1 if fresh is not None else segments.starts + segments.counts - 1
        window = self.schema.swa_window_size
        kv, positions = read_window(ring, segments.slots, newest, layer=self._index, window=window, dtype=dtype)
        if fresh is not None:
            self._check("fresh", fresh, self.schema.head_dim)
            # What is read back after storing, so that results do not depend on where a prompt is cut.
            stored = decode_record(encode_record(fresh, Record(ring.nope, ring.rope, ring.inv_scale)), dtype)
            offset = jnp.arange(segments.tokens.shape[1], dtype=jnp.int32)[None]
            own = jnp.where(offset < segments.counts[:, None], segments.starts[:, None] + offset, -1)
            kv = jnp.concatenate([kv, to_segments(stored, segments)], axis=1)
            positions = jnp.concatenate([positions, own], axis=1)
        row = per_token(positions, segments)
        token = jnp.asarray(self.plan.positions)[:, None]
        live = (self._slots >= 0)[:, None]
        return SWAView(kv, positions, live & (row >= 0) & (row <= token) & (row > token - window))

    # Attention.

    def attend(
        self,
        q: Array,
        sink: Array,
        *,
        selected: Array | None = None,
        fresh: Array | None = None,
        scale: float | None = None,
        raw: RawQuery | None = None,
    ) -> Array:
        """One softmax over the window, the compressed entries and a sink, straight from the stored records.

        A decode step writes its token, then attends. A step with several tokens of a slot attends first, with
        `fresh`, and writes after (`write_swa(fresh, after=output)`); its entries are written before in both. Slots,
        positions and tables decide what a token sees, never what a row holds; padding gets 0. What numbers are promised
        is in docs/records.md. (arXiv 2606.19348, section 2.3.)

        Args:
          q: (T, heads, head_dim) float32 | bfloat16, normed and rotated; with `raw` neither.
          sink: (heads,) float32, a logit that only adds to the denominator.
          selected: (T, K) int32, entries that each token attends to by index in the request, -1 for none; None for
            every visible one. A layer without entries takes None.
          fresh: (T, head_dim) float32 | bfloat16, the step's kv as `write_swa` takes it, not written yet.
          scale: factor of the scores, a Python number, by default head_dim ** -0.5.
          raw: cos and sin (T, rope_dim // 2) float32 of the tokens and eps: q comes straight from its projection, is
            normed per head and rotated here, and the output is rotated back.
        Returns:
          (T, heads, head_dim) in the dtype of q.
        Raises:
          ValueError: for another shape or dtype, `selected` in an SWA layer, a scale that is no number, or a step with
            several tokens of a slot without `fresh`.
        """
        tokens, schema = self.plan.slots.shape[0], self.schema
        check_array(self._name, "q", q, (tokens, "heads", schema.head_dim), FLOATS)
        check_array(self._name, "sink", sink, (q.shape[1],), (jnp.float32,), " (a logit for each head of q)")
        if selected is not None:
            self._need(("csa", "hca"), "compressed entries")
            check_array(self._name, "selected", selected, (tokens, "K"), (jnp.int32,))
        if raw is not None:
            check_raw(self._name, raw, tokens, schema.rope_dim)
            raw = raw._replace(eps=float(raw.eps))
        if scale is not None:
            check_number(self._name, "scale", scale)
            scale = float(scale)
        ring = self._state.ring
        stored = Record(ring.nope, ring.rope, ring.inv_scale)
        own = None
        if fresh is not None:
            self._check("fresh", fresh, schema.head_dim)
            # As it will be stored, so that results do not depend on where a prompt is cut.
            own = encode_record(fresh, stored)
        elif not self.plan.one_token_per_slot:
            raise ValueError(
                f"layer {self._name}: attend got several tokens of a slot without fresh, expected their kv: attend "
                "first, then write_swa(kv, after=output)"
            )
        pool = self._pool
        return attend(
            q,
            sink,
            self._tokens,
            stored,
            None if pool is None else pool.entries,
            selected,
            own,
            raw,
            layer=self._index,
            window=schema.swa_window_size,
            ratio=schema.compress_ratio,
            max_entries=None if pool is None else self.max_entries,
            scale=schema.head_dim**-0.5 if scale is None else scale,
        )

    # Compressed entries.

    def _writable(self) -> None:
        if self.unallocated:
            raise RuntimeError(self.unallocated)

    def write_compressed(
        self, kv: Array, gate: Array, weights: CompressorWeights, *, eps: float = 1e-6
    ) -> "LayerCacheHandle":
        """Takes the compressor's projections of the tokens, and stores the entries of spans that close.

        Args:
          kv, gate: (T, lanes * head_dim) float32 | bfloat16, raw; two lanes in CSA layers, one in HCA layers.
          weights: what turns them into an entry.
          eps: of the RMSNorm.

        Returns:
          The handle after the write.

        Raises:
          ValueError: another shape or dtype, or an SWA layer.
          RuntimeError: the plan was made without the blocks that these entries need.
        """
        self._check_compressor(kv, gate, weights)
        old = self._state.tail
        assert old is not None  # of these kinds of layers
        entries, tail = compress(
            _given(self._pool).entries, old, Projections(kv, gate, weights), self._written, layer=self._index, eps=eps,
        )  # fmt: skip
        cache = self.cache.with_state(self.schema.kind, tail=tail).with_paged(self.schema.kind, entries=entries)
        return replace(self, cache=cache)

    def write_indexer(
        self, kv: Array, gate: Array, weights: CompressorWeights, *, eps: float = 1e-6
    ) -> "LayerCacheHandle":
        """As `write_compressed`, for the indexer's keys; CSA layers only.

        Args:
          kv, gate: (T, 2 * index_head_dim) float32 | bfloat16, raw.
          weights: what turns them into a key.
          eps: of the RMSNorm.

        Returns:
          The handle after the write.

        Raises:
          ValueError: another shape or dtype, or an SWA or HCA layer.
          RuntimeError: as `write_compressed`.
        """
        self._check_indexer(kv, gate, weights)
        keys, tail = compress_indexer(
            _given(_given(self._pool).indexer), _given(self._state.indexer_tail), Projections(kv, gate, weights),
            self._written, format=self.schema.indexer_dtype, layer=self._index, eps=eps,
        )  # fmt: skip
        cache = self.cache.with_state("csa", indexer_tail=tail).with_paged("csa", indexer=keys)
        return replace(self, cache=cache)

    def _check_compressor(self, kv: Array, gate: Array, weights: CompressorWeights) -> None:
        self._need(("csa", "hca"), "compressed entries")
        self._check_projections(kv, gate, weights, 2 if self.schema.overlap else 1, self.schema.head_dim)

    def _check_indexer(self, kv: Array, gate: Array, weights: CompressorWeights) -> None:
        self._need(("csa",), "indexer keys")
        self._check_projections(kv, gate, weights, 2, self.schema.index_head_dim)

    def _check_projections(self, kv: Array, gate: Array, weights: CompressorWeights, lanes: int, dim: int) -> None:
        self._writable()
        self._check("kv", kv, lanes * dim)
        self._check("gate", gate, lanes * dim)
        check_weights(self._name, weights, self.schema.compress_ratio, lanes, dim, self.schema.rope_dim)

    def write_layer(
        self,
        window: RawWindow,
        compressor: Projections | None = None,
        indexer: Projections | None = None,
        *,
        eps: float = 1e-6,
    ) -> "LayerCacheHandle":
        """All that a layer writes in a decode step, in one launch.

        Stores the bits of `write_swa_fused`, `write_compressed` and `write_indexer`.

        Args:
          window: the raw output of the wkv projection, and what norms and rotates it.
          compressor: projections for `write_compressed`; CSA and HCA layers.
          indexer: projections for `write_indexer`; CSA layers.
          eps: of every RMSNorm.

        Returns:
          The handle after the writes.

        Raises:
          ValueError: as the three methods, and for a part too many or too few, or a plan that is not a decode step's.
          RuntimeError: as `write_compressed`.
        """
        kind = self.schema.kind
        for name, part, kinds in (("compressor", compressor, ("csa", "hca")), ("indexer", indexer, ("csa",))):
            if (part is None) == (kind in kinds):
                got, expected = ("None", "its projections") if part is None else ("projections", "None")
                raise ValueError(f"layer {self._name} is {kind.upper()}: got {got} for {name}, expected {expected}")
        if not self.plan.one_token_per_slot:
            raise ValueError(
                f"layer {self._name}: write_layer got several tokens of a slot, expected a decode step; "
                "another reads first, then uses write_swa"
            )
        self._check("kv", window.kv, self.schema.head_dim)
        if compressor is not None:
            self._check_compressor(*compressor)
        if indexer is not None:
            self._check_indexer(*indexer)
        arrays = write_layer(
            self._arrays(), LayerInputs(window, compressor, indexer), self._written,
            format=self.schema.indexer_dtype, layer=self._index, eps=eps,
        )  # fmt: skip
        cache = self.cache.with_state(kind, ring=arrays.ring, tail=arrays.tail, indexer_tail=arrays.keys_tail)
        if self._pool is not None:
            cache = cache.with_paged(kind, entries=arrays.entries, indexer=arrays.keys)
        return replace(self, cache=cache)

    def _arrays(self) -> LayerState:
        state, pool = self._state, self._pool
        if pool is None:
            return LayerState(state.ring)
        return LayerState(state.ring, pool.entries, state.tail, pool.indexer, state.indexer_tail)

    @property
    def _tokens(self) -> StepTokens:
        """Where the plan's tokens are."""
        table = self.cache.block_table.get(self.schema.kind)
        return StepTokens(self._slots, jnp.asarray(self.plan.positions), self._segments, table)

    @property
    def _written(self) -> StepTokens:
        """`_tokens` with the blocks that the step writes."""
        tokens, kept = self._tokens, self.plan.kept_blocks
        if tokens.table is None or kept is None:
            return tokens
        column = jnp.arange(tokens.table.shape[1], dtype=jnp.int32)[None]
        return tokens._replace(table=jnp.where(column < jnp.asarray(kept)[:, None], -1, tokens.table))

    @property
    def _table(self) -> Array:
        return self.cache.block_table[self.schema.kind]

    @property
    def max_entries(self) -> int:
        """Entries of a request that readers look at: a static bound."""
        columns = self._table.shape[1] if self.plan.max_blocks is None else self.plan.max_blocks
        return min(columns, self._table.shape[1]) * self.schema.entries_per_block

    def visible_entries(self) -> Array:
        """(T,) int32: a token at position p sees entries 0 … (p + 1) // ratio - 1; 0 for padding."""
        live = self._slots >= 0
        return jnp.where(live, (jnp.asarray(self.plan.positions) + 1) // self.schema.compress_ratio, 0)

    def _dense(self) -> tuple[Array, Array, Array]:
        """How many entries a segment has (S,), their first positions (S, E), whether a token sees them (T, E)."""
        segments = self._segments
        entry = jnp.arange(self.max_entries, dtype=jnp.int32)[None]
        closed = jnp.where(segments.slots >= 0, segments.starts + segments.counts, 0) // self.schema.compress_ratio
        positions = jnp.where(entry < closed[:, None], entry * self.schema.compress_ratio, -1)
        return closed, positions, entry < self.visible_entries()[:, None]

    def read_classical_view(self, selected: Array | None = None, dtype: DTypeLike = jnp.float32) -> ClassicalView:
        """Compressed entries of every segment, or those that each token selects.

        Args:
          selected: (T, K) int32, entries by index in the request, -1 for none; None for all.
          dtype: of the vectors returned.

        Returns:
          Entries, the positions of their first tokens, and which of them each token sees.

        Raises:
          ValueError: an SWA layer, another shape or dtype of selected, or a dtype that is not floating.
        """
        self._need(("csa", "hca"), "compressed entries")
        check_floating(self._name, dtype)
        pool = _given(self._pool).entries
        if selected is None:
            closed, positions, valid = self._dense()
            kv = read_entries(
                pool, self._table, self._segments.slots, closed, layer=self._index, max_blocks=self._num_columns(),
                dtype=dtype,
            )  # fmt: skip
            return ClassicalView(kv, positions, valid)
        selected = jnp.asarray(selected)
        check_array(self._name, "selected", selected, (self.plan.slots.shape[0], "K"), (jnp.int32,))
        visible = self.visible_entries()
        valid = (selected >= 0) & (selected < visible[:, None])
        kv = read_entries(pool, self._table, self._slots, visible, selected, layer=self._index, dtype=dtype)
        return ClassicalView(kv, jnp.where(valid, selected * self.schema.compress_ratio, -1), valid)

    def read_indexer_view(self) -> IndexerView:
        """Indexer keys of every segment; FP4 keys are in the Hadamard-rotated basis (`keys_rotated`)."""
        self._need(("csa",), "indexer keys")
        closed, positions, valid = self._dense()
        keys = read_keys(
            _given(_given(self._pool).indexer), self._table, self._segments.slots, closed,
            format=self.schema.indexer_dtype, layer=self._index, max_blocks=self._num_columns(),
        )  # fmt: skip
        return IndexerView(keys, positions, valid)

    def select(self, q: Array, weights: Array, k: int, *, raw: tuple[Array, Array] | None = None) -> Array:
        """The k best entries for each token, by the indexer's scores (arXiv 2606.19348, section 2.3); CSA layers only.

        A token that sees at most k entries gets all of them, and where `max_entries` <= k no key is read. Equal scores
        go to the lower index; a NaN counts as the best score.

        Args:
          q: (T, heads, index_head_dim) float32 | bfloat16, rotated by RoPE; where keys are stored rotated by Hadamard,
            the query is rotated here.
          weights: (T, heads) float32 | bfloat16, of the heads.
          k: how many entries, at least 1.
          raw: cos and sin (T, rope_dim // 2) float32, where q is not rotated by RoPE yet.

        Returns:
          (T, k) int32: index in the request, in no particular order, -1 where fewer are visible.

        Raises:
          ValueError: an SWA or HCA layer, another shape or dtype, or k below 1.
        """
        self._need(("csa",), "indexer keys")
        if k < 1:
            raise ValueError(f"layer {self._name}: k is {k}, expected at least 1")
        tokens, floating = self.plan.slots.shape[0], (jnp.float32, jnp.bfloat16)
        check_array(self._name, "q", q, (tokens, "heads", self.schema.index_head_dim), floating)
        check_array(self._name, "weights", weights, (tokens, q.shape[1]), floating)
        for name, x in zip(("cos", "sin"), raw or (), strict=False):
            check_array(self._name, name, x, (tokens, "r"), (jnp.float32,))
        return select(
            q, weights, self._tokens, _given(_given(self._pool).indexer), k, format=self.schema.indexer_dtype,
            layer=self._index, ratio=self.schema.compress_ratio, max_entries=self.max_entries, raw=raw,
        )  # fmt: skip

    @property
    def keys_rotated(self) -> bool:
        """Whether stored indexer keys are rotated by the Hadamard matrix, so that queries must be too."""
        return self.schema.indexer_dtype in ("nvfp4", "mxfp4")

    def _num_columns(self) -> int:
        return self.max_entries // self.schema.entries_per_block


def _given(part: T | None) -> T:
    """A part of the cache that layers of this kind have."""
    assert part is not None
    return part
