"""Steps that fill a cache from token ids alone, without a model, and what the cache must show then.

What a layer stores for a token follows from (token, position); entries and keys follow from the tokens of their
windows. So whatever a cache shows can be recomputed from a list of tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import DSV4Config, KVCacheManager
from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan, group_tokens
from dsv4_jax.cache.schema import build_schema
from dsv4_jax.model.layer_schedule import LayerSpec
from dsv4_jax.ops.nn.rope import rope_frequencies
from dsv4_jax.ops.write.compress import CompressorWeights


class LayerTables(NamedTuple):
    """Of one layer: what a token id gives, and what a position adds."""

    window: np.ndarray  # (vocabulary, head_dim)
    by_position: np.ndarray  # (LENGTH, head_dim)
    kv: np.ndarray | None  # (vocabulary, lanes * head_dim), into the compressor; None for SWA
    gate: np.ndarray | None
    key_kv: np.ndarray | None  # (vocabulary, 2 * index_head_dim), into the indexer's compressor; CSA only
    key_gate: np.ndarray | None
    weights: CompressorWeights | None
    key_weights: CompressorWeights | None


def _layer_tables(rng: np.random.Generator, config: DSV4Config, spec: LayerSpec, length: int) -> LayerTables:
    frequencies = rope_frequencies(config.rope_dim, config.compress_rope_theta)
    lanes = {"SWA": 0, "CSA": 2, "HCA": 1}[spec.attn.name]
    v, d, key, csa = config.vocab_size, config.head_dim, config.index_head_dim, lanes == 2

    def table(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def weights(lanes: int, dim: int) -> CompressorWeights:
        return CompressorWeights(table(spec.compress_ratio, lanes * dim), 1 + table(dim) / 8, frequencies)

    return LayerTables(
        window=table(v, d),
        by_position=table(length, d),
        kv=table(v, lanes * d) if lanes else None,
        gate=table(v, lanes * d) if lanes else None,
        key_kv=table(v, 2 * key) if csa else None,
        key_gate=table(v, 2 * key) if csa else None,
        weights=weights(lanes, d) if lanes else None,
        key_weights=weights(2, key) if csa else None,
    )


class LayerSeen(NamedTuple):
    """The views of one layer that a step had. S segments, T tokens, N window rows, E entries."""

    rows: jax.Array  # (S, N, head_dim)
    row_positions: jax.Array  # (S, N)
    row_valid: jax.Array  # (T, N)
    entries: jax.Array | None  # (S, E, head_dim)
    entry_positions: jax.Array | None  # (S, E)
    entry_valid: jax.Array | None  # (T, E)
    keys: jax.Array | None  # (S, E, index_head_dim)


class Expected(NamedTuple):
    """What one layer stores for R lists of tokens."""

    rows: np.ndarray  # (R, length, head_dim) by position
    entries: np.ndarray | None  # (R, entries, head_dim)
    keys: np.ndarray | None  # (R, entries, index_head_dim)


@jax.tree_util.register_pytree_node_class
class Packed:
    """A tree of arrays as one array of each dtype: an array takes as long to get as many numbers of it."""

    def __init__(self, arrays: Any, form: Any):
        self.arrays, self.form = arrays, form

    @classmethod
    def of(cls, tree: Any) -> "Packed":
        """In a compiled program, over a mesh on every shard."""
        leaves, structure = jax.tree.flatten(tree)
        parts: dict[str, list[jax.Array]] = {}
        places, sizes = [], dict.fromkeys((str(x.dtype) for x in leaves), 0)
        for x in leaves:
            dtype = str(x.dtype)
            parts.setdefault(dtype, []).append(x.reshape(-1))
            places.append((dtype, sizes[dtype], sizes[dtype] + x.size, x.shape[1:]))
            sizes[dtype] += x.size
        return cls(
            {dtype: jnp.concatenate(x) for dtype, x in parts.items()}, (structure, tuple(places), tuple(sizes.items()))
        )

    def on_host(self) -> Any:
        """The tree; over a mesh each array has those of all shards, one after the other."""
        structure, places, sizes = self.form
        all_of = {dtype: np.asarray(self.arrays[dtype]).reshape(-1, size) for dtype, size in sizes}
        leaves = [all_of[dtype][:, start:stop].reshape(-1, *shape) for dtype, start, stop, shape in places]
        return jax.tree.unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.arrays,), self.form

    @classmethod
    def tree_unflatten(cls, form: Any, children: tuple[Any]) -> "Packed":
        return cls(*children, form)


def _seen(handle: LayerCacheHandle, fresh: jax.Array | None) -> LayerSeen:
    window = handle.read_swa_view(fresh)
    if handle.schema.kind == "swa":
        return LayerSeen(*window, None, None, None, None)
    entries = handle.read_classical_view()
    keys = handle.read_indexer_view().keys if handle.schema.kind == "csa" else None
    return LayerSeen(*window, *entries, keys)


def empty_cache(config: DSV4Config, count: int, length: int, **options: Any) -> tuple[KVCache, StepPlan]:
    """A cache that holds nothing but blocks for `count` requests, and the step that brings all their tokens."""
    schemas = tuple(build_schema(config, spec, **options) for spec in config.schedule)
    blocks = {s.kind: s.blocks_for(length) for s in schemas if s.compress_ratio}
    cache = KVCache.allocate(schemas, count, {k: n * count for k, n in blocks.items()}, blocks)
    tables = {k: jnp.arange(n * count, dtype=jnp.int32).reshape(count, n) for k, n in blocks.items()}
    slots = np.repeat(np.arange(count, dtype=np.int32), length)
    positions = np.tile(np.arange(length, dtype=np.int32), count)
    return cache.replace_tables(tables), StepPlan(slots, positions, group_tokens(slots, positions))


class Fill:
    """Steps over caches of one geometry, for texts of `length` tokens; tokens come `width` of a slot at most."""

    def __init__(
        self, config: DSV4Config, *, length: int, width: int, max_rollback: int, forgets_blocks: bool = False,
        **options: Any,
    ):  # fmt: skip
        """options: of the records, as for KVCacheManager. forgets_blocks: steps do not enter a plan's blocks in the
        tables, and leave that to the handles."""
        self.config, self.length, self.width, self.max_rollback = config, length, width, max_rollback
        self.forgets_blocks = forgets_blocks
        self.schedule, self.options = config.schedule, options
        # Native forms store the same bits in every step. In the jax.numpy form of a reduction the last bit depends on
        # the shapes of the program; it may be the one that decides how a value is rounded to bfloat16.
        self.tolerance = {"fp8": None, "bf16": 2.0**-7, "fp32": 1e-5}[options["cache_dtype"]]
        rng = np.random.default_rng(2606)
        self.tables = tuple(_layer_tables(rng, config, spec, length) for spec in self.schedule)

    def new_manager(self, *, slots: int, blocks: int, **options: Any) -> KVCacheManager:
        """A manager with `blocks` blocks of each kind."""
        options = {"max_context_len": self.length, "max_rollback": self.max_rollback, **self.options, **options}
        return KVCacheManager(
            self.config, self.schedule, max_concurrent_requests=slots, num_blocks_per_csa_layer=blocks,
            num_blocks_per_hca_layer=blocks, **options,
        )  # fmt: skip

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, cache: KVCache, plan: StepPlan, tokens: jax.Array) -> tuple[KVCache, Packed]:
        """Stores a step's tokens in every layer -> the cache after it, and what the step's tokens saw."""
        if not self.forgets_blocks:
            cache = cache.with_blocks(plan.new_blocks)
        seen = []
        for layer in range(len(self.schedule)):
            kv = self._window_kv(layer, tokens, jnp.asarray(plan.positions))
            handle = self._write_entries(LayerCacheHandle(cache, plan, layer), tokens)
            if plan.one_token_per_slot:
                handle = handle.write_swa(kv)
                seen.append(_seen(handle, None))
            else:
                seen.append(_seen(handle, kv))
                handle = handle.write_swa(kv, after=seen[-1].rows)
            cache = handle.cache
        return cache, Packed.of(seen)

    @partial(jax.jit, static_argnums=0)
    def look(self, cache: KVCache, plan: StepPlan) -> Packed:
        """What the tokens of a plan see, nothing being written; the plan brings nothing new."""
        return Packed.of([_seen(LayerCacheHandle(cache, plan, layer), None) for layer in range(len(self.schedule))])

    def recompute(self, tokens: np.ndarray) -> list[Expected]:
        """From nothing but tokens (R, length) int32: one step over a cache that holds nothing."""
        return self._recompute(tokens).on_host()

    @partial(jax.jit, static_argnums=0)
    def _recompute(self, tokens: jax.Array) -> Packed:
        cache, plan = empty_cache(self.config, len(tokens), self.length, **self.options)
        tokens, expected = tokens.reshape(-1), []
        for layer in range(len(self.schedule)):
            handle = self._write_entries(LayerCacheHandle(cache, plan, layer), tokens)
            seen = _seen(handle, self._window_kv(layer, tokens, jnp.asarray(plan.positions)))
            expected.append(Expected(seen.rows[:, -self.length :], seen.entries, seen.keys))
        return Packed.of(expected)

    def _window_kv(self, layer: int, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        table = self.tables[layer]
        return jnp.asarray(table.window)[tokens] + jnp.asarray(table.by_position)[positions]

    def _write_entries(self, handle: LayerCacheHandle, tokens: jax.Array) -> LayerCacheHandle:
        table = jax.tree.map(jnp.asarray, self.tables[handle.layer_idx])
        if table.key_kv is not None:
            handle = handle.write_indexer(table.key_kv[tokens], table.key_gate[tokens], table.key_weights)
        if table.kv is not None:
            handle = handle.write_compressed(table.kv[tokens], table.gate[tokens], table.weights)
        return handle

    def compare(self, seen: Packed, expected: list[Expected], plan: StepPlan, unlike: np.ndarray) -> None:
        """AssertionError unless every token saw its window, entries and keys: all of them, once, with the right values.

        expected: by slot. unlike: (T,) bool, tokens that need not; they see what they are computed again for.
        """
        slots, positions = plan.slots, plan.positions
        if plan.grouped is None:
            segment = np.arange(len(slots))
        else:
            segment = np.minimum(plan.grouped.rows // plan.grouped.tokens.shape[1], len(plan.grouped.slots) - 1)
        newest = np.where(slots >= 0, positions, -1)[:, None]  # padding sees nothing
        position, entry = np.arange(self.length), np.arange(self.length)
        inside = (position <= newest) & (position > newest - self.config.sliding_window)
        for spec, got, want in zip(self.schedule, seen.on_host(), expected, strict=True):
            where = f"layer {spec.layer_idx} ({spec.attn.name})"
            token, row = np.nonzero(got.row_valid & ~unlike[:, None])
            at = got.row_positions[segment[token], row]
            times = np.bincount(token * self.length + np.clip(at, 0, self.length - 1), minlength=inside.size).reshape(
                inside.shape
            )
            _equal(times, inside & ~unlike[:, None], where, "how often each position of the window is seen")
            rows = got.rows[segment[token], row]
            _equal(rows, want.rows[slots[token], at], where, "window rows", slots[token], at)
            if got.entries is None:
                continue
            _equal(
                got.entry_valid,
                entry[: got.entry_valid.shape[1]] < (newest + 1) // spec.compress_ratio,
                where,
                "which entries are seen",
            )
            token, index = np.nonzero(got.entry_valid & ~unlike[:, None])
            slot, segments = slots[token], segment[token]
            at = got.entry_positions[segments, index]
            _equal(at, index * spec.compress_ratio, where, "positions of entries", slot, index)
            entries = got.entries[segments, index]
            _equal(entries, want.entries[slot, index], where, "entries", slot, index, tolerance=self.tolerance)
            if got.keys is not None:
                keys = got.keys[segments, index]
                _equal(keys, want.keys[slot, index], where, "keys", slot, index, tolerance=self.tolerance)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize]) if x.dtype.kind == "f" else x


def _equal(
    got: np.ndarray, want: np.ndarray, where: str, what: str, *index: np.ndarray, tolerance: float | None = None
) -> None:
    """AssertionError unless equal, bit for bit or within a tolerance; index: what each row is of."""
    wrong = _bits(got) != _bits(want) if tolerance is None else ~(np.abs(got - want) <= tolerance * (1 + np.abs(want)))
    if wrong.any():
        rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=-1))
        at = sorted({tuple(int(i[r]) for i in index) for r in rows}) if index else rows.tolist()
        raise AssertionError(
            f"{where}: {what} differ at {at[:8]}: got {got[rows[0]].ravel()[:9]}, expected {want[rows[0]].ravel()[:9]}"
        )
