"""The host's side of the cache: slots, blocks and lengths between jitted steps. Never inside jit."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .allocator import BlockAllocator
from .handle import LayerCacheHandle
from .kv_cache import KVCache
from .paged_cache import PagedKVPool
from .plan import StepPlan, group_tokens
from .schema import BLOCK_SIZE_ORIGINAL_TOKENS, build_schema
from .state_cache import StateCachePool


class LayerViews(Sequence):
    """One item per layer, sliced from the stacked arrays when asked for."""

    def __init__(self, length: int, view: Callable[[int], Any]):
        self._length, self._view = length, view

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, layer_idx: int):
        """The layer's view; negative indices count from the end."""
        if not -self._length <= layer_idx < self._length:
            raise IndexError(f"layer {layer_idx}: the model has layers 0 to {self._length - 1}")
        return self._view(layer_idx % self._length)


class KVCacheManager:
    """Builds the cache of a model, hands out its slots and blocks, and plans its steps.

    `cache` is the pytree: a loop takes it, donates it to its jitted step and puts the result back. Everything else here
    is bookkeeping on the host, and every call that fails leaves it as it was.
    """

    def __init__(
        self,
        config: Any,
        schedule: Sequence[Any],
        *,
        max_concurrent_requests: int,
        num_blocks_per_csa_layer: int,
        num_blocks_per_hca_layer: int,
        max_context_len: int | None = None,
        cache_dtype: str = "fp8",
        indexer_dtype: str | None = None,
        max_rollback: int = 0,
    ):
        """Allocates the cache of all layers of `schedule` (build_schedule(config)).

        num_blocks_per_*_layer: physical blocks (`compute_block_budget` says how many a load needs). max_context_len:
        tokens of one request at most, by default as many as the pools hold blocks for; a step's readers look at that
        many. cache_dtype, indexer_dtype, max_rollback: see `build_schema`. Raises ValueError for what does not fit.
        """
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests is {max_concurrent_requests}: expected at least 1")
        schemas = tuple(
            build_schema(config, spec, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype, max_rollback=max_rollback)
            for spec in schedule
        )
        num_blocks = {"csa": num_blocks_per_csa_layer, "hca": num_blocks_per_hca_layer}
        kinds = {s.kind: s for s in schemas if s.entries_per_block}
        if max_context_len is None:
            max_context_len = max((num_blocks[k] for k in kinds), default=1) * BLOCK_SIZE_ORIGINAL_TOKENS
        elif max_context_len < 1:
            raise ValueError(f"max_context_len is {max_context_len}: expected at least 1 token")
        self.config = config
        self.max_context_len = max_context_len
        self.cache = KVCache.allocate(
            schemas,
            max_concurrent_requests,
            num_blocks,
            {k: max(s.blocks_for(max_context_len), 1) for k, s in kinds.items()},
        )
        self._schema_of = kinds
        self._allocators = {k: BlockAllocator(num_blocks[k]) for k in kinds}
        self._blocks: dict[int, dict[str, list[int]]] = {}
        self._lengths: dict[int, int] = {}
        self._free_slots = list(range(max_concurrent_requests))

    # What is there.

    @property
    def paged_pools(self) -> LayerViews:
        """Per layer its PagedKVPool, None for SWA."""

        def view(layer_idx: int) -> PagedKVPool | None:
            kind = self.cache.schemas[layer_idx].kind
            return self.cache.paged[kind].layer(self.cache.layers[layer_idx]) if kind in self.cache.paged else None

        return LayerViews(len(self.cache.schemas), view)

    @property
    def state_pools(self) -> LayerViews:
        """Per layer its StateCachePool."""

        def view(layer_idx: int) -> StateCachePool:
            return self.cache.state[self.cache.schemas[layer_idx].kind].layer(self.cache.layers[layer_idx])

        return LayerViews(len(self.cache.schemas), view)

    @property
    def max_concurrent_requests(self) -> int:
        """Slots."""
        return self.cache.max_requests

    @property
    def active_slots(self) -> list[int]:
        """Slots of admitted requests, ascending."""
        return sorted(self._blocks)

    def num_free_blocks(self, kind: str) -> int:
        """Free blocks of the "csa" or "hca" pools."""
        return self._allocators[self._kind(kind)].num_free

    def length(self, slot: int) -> int:
        """Tokens planned for `slot` so far."""
        self._require(slot)
        return self._lengths[slot]

    def blocks(self, slot: int) -> dict[str, list[int]]:
        """Blocks of `slot` by kind, in order."""
        self._require(slot)
        return {kind: list(ids) for kind, ids in self._blocks[slot].items()}

    def memory_bytes(self) -> int:
        """Bytes of device memory the cache holds."""
        return self.cache.memory_bytes()

    # Requests come and go.

    def admit_request(self) -> int:
        """The lowest free slot. Raises RuntimeError when all are taken."""
        if not self._free_slots:
            raise RuntimeError(
                f"all {self.max_concurrent_requests} concurrent requests are running: release one or make "
                "max_concurrent_requests larger"
            )
        slot = heapq.heappop(self._free_slots)
        self._blocks[slot] = {kind: [] for kind in self._allocators}
        self._lengths[slot] = 0
        return slot

    def release_request(self, slot: int) -> None:
        """Ends the request of `slot`: its blocks and the slot are free again. Raises ValueError if it has none."""
        self._require(slot)
        owned = self._blocks.pop(slot)
        del self._lengths[slot]
        for kind, ids in owned.items():
            self._allocators[kind].release(ids)
        heapq.heappush(self._free_slots, slot)
        # An entry that nobody gave a block must find none, not that of a former owner.
        table = {k: t.at[slot].set(-1) if owned[k] else t for k, t in self.cache.block_table.items()}
        self._set_tables(table)

    def allocate_block(self, layer_idx: int, request_slot: int) -> int:
        """Gives the request its next block in this layer, and in all layers of its kind, which share one block table.

        Returns the block's id. Raises ValueError for an SWA layer, a slot without a request or a full table,
        RuntimeError (OOM) when no block is free.
        """
        self._require(request_slot)
        kind = self._layer_kind(layer_idx)
        if kind not in self._allocators:
            raise ValueError(f"layer {layer_idx} is SWA: it has no blocks")
        owned = self._blocks[request_slot][kind]
        self._check_room(request_slot, kind, len(owned) + 1)
        block = int(self._allocators[kind].acquire(1)[0])
        table = self.cache.block_table[kind].at[request_slot, len(owned)].set(block)
        owned.append(block)
        self._set_tables({**self.cache.block_table, kind: table})
        return block

    # Steps.

    def plan_step(
        self,
        request_slots: Any,
        positions: Any,
        *,
        lookahead: int = 0,
        num_segments: int | None = None,
        width: int | None = None,
        max_blocks: int | None = None,
    ) -> StepPlan:
        """Plans a step of T tokens and gives out the blocks it needs, all of them or none.

        request_slots, positions: (T,) integers in any order, slot -1 for padding. lookahead: tokens more per request
        that the blocks must suffice for, so that a loop can go on without the host. num_segments, width: sizes to pad
        the grouping to, where tokens of one slot come together (see `group_tokens`). Raises ValueError for slots
        without a request or bad positions, RuntimeError (OOM) when the blocks do not suffice; then nothing changed.
        """
        slots, positions = self._tokens(request_slots, positions)
        grouped = group_tokens(slots, positions, num_segments, width)
        ends = {int(s): 0 for s in np.unique(slots[slots >= 0])}
        for slot in ends:
            ends[slot] = int(positions[slots == slot].max()) + 1
        need = {
            kind: {slot: self._missing(kind, slot, end + lookahead) for slot, end in ends.items()}
            for kind in self._allocators
        }
        for kind, by_slot in need.items():
            asked, free = sum(by_slot.values()), self._allocators[kind].num_free
            if asked > free:
                raise RuntimeError(
                    f"OOM: the step needs {asked} more {kind.upper()} blocks, {free} are free: release requests or "
                    f"make num_blocks_per_{kind}_layer larger"
                )
        rows: dict[str, np.ndarray] = {}
        for kind, by_slot in need.items():
            # A fixed number of rows for a step's shape, so that steps of one shape compile once.
            most = max(len(slots), 1) if grouped is None else len(grouped.slots)
            tokens = lookahead + (1 if grouped is None else grouped.tokens.shape[1])
            each = -(-tokens // BLOCK_SIZE_ORIGINAL_TOKENS) + 1
            rows[kind] = np.full((max(most * each, sum(by_slot.values())), 3), -1, np.int32)
            filled = 0
            for slot, n in by_slot.items():
                for block in self._allocators[kind].acquire(n):
                    rows[kind][filled] = slot, len(self._blocks[slot][kind]), block
                    self._blocks[slot][kind].append(int(block))
                    filled += 1
        for slot, end in ends.items():
            self._lengths[slot] = end
        return StepPlan(slots, positions, grouped, rows, max_blocks)

    def acquire(self, layer_idx: int, request_slots: Any, positions: Any, request_ids: Any = None) -> LayerCacheHandle:
        """A handle on one layer for T tokens; allocates neither device memory nor blocks (`allocate_block` does).

        request_slots, positions: (T,) integers, token-major in any order, slot -1 for padding. request_ids: (T,)
        integers, equal where tokens belong to one request: a check that no two requests got one slot. With fewer
        request_slots (R,) than positions, request_ids says for each token which of them is its own. Raises ValueError
        when these do not fit together.
        """
        kind = self._layer_kind(layer_idx)
        slots = np.asarray(request_slots)
        if request_ids is not None:
            slots = _slots_of_tokens(slots, np.asarray(positions), np.asarray(request_ids))
        slots, positions = self._tokens(slots, positions)
        plan = StepPlan(slots, positions, group_tokens(slots, positions))
        reason = None
        for slot in np.unique(slots[slots >= 0]) if kind in self._allocators else ():
            schema, owned = self._schema_of[kind], len(self._blocks[int(slot)][kind])
            needed = schema.blocks_for(int(positions[slots == slot].max()) + 1)
            if needed > owned:
                reason = (
                    f"layer {layer_idx}: slot {slot} has {owned} blocks and these positions need {needed}: call "
                    f"allocate_block({layer_idx}, {slot}) first"
                )
                break
        return LayerCacheHandle(self.cache, plan, layer_idx, unallocated=reason)

    # Checks.

    def _tokens(self, request_slots: Any, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        slots, positions = np.asarray(request_slots), np.asarray(positions)
        if slots.ndim != 1 or slots.shape != positions.shape:
            raise ValueError(
                f"request_slots has shape {slots.shape} and positions {positions.shape}: expected both (T,)"
            )
        if slots.size and not (np.issubdtype(slots.dtype, np.integer) and np.issubdtype(positions.dtype, np.integer)):
            raise ValueError(f"request_slots is {slots.dtype} and positions {positions.dtype}: expected integers")
        slots = slots.astype(np.int32)
        for slot in np.unique(slots[slots != -1]):
            self._require(int(slot))
        live = positions[slots >= 0]
        if live.size and (live.min() < 0 or live.max() >= self.max_context_len):
            raise ValueError(
                f"positions reach from {live.min()} to {live.max()}: expected 0 to {self.max_context_len - 1} "
                "(max_context_len - 1)"
            )
        return slots, positions.astype(np.int32)

    def _require(self, slot: int) -> None:
        if slot not in self._blocks:
            raise ValueError(f"slot {slot} holds no request: slots in use are {self.active_slots}")

    def _kind(self, kind: str) -> str:
        if kind not in self._allocators:
            raise ValueError(f"kind {kind!r} has no blocks here: expected one of {sorted(self._allocators)}")
        return kind

    def _layer_kind(self, layer_idx: int) -> str:
        if not 0 <= layer_idx < len(self.cache.schemas):
            raise ValueError(f"layer {layer_idx}: the model has layers 0 to {len(self.cache.schemas) - 1}")
        return self.cache.schemas[layer_idx].kind

    def _check_room(self, slot: int, kind: str, blocks: int) -> None:
        columns = self.cache.block_table[kind].shape[1]
        if blocks > columns:
            raise ValueError(
                f"slot {slot} needs {blocks} {kind.upper()} blocks: max_context_len = {self.max_context_len} allows "
                f"{columns}"
            )

    def _missing(self, kind: str, slot: int, num_tokens: int) -> int:
        needed = self._schema_of[kind].blocks_for(min(num_tokens, self.max_context_len))
        return max(needed - len(self._blocks[slot][kind]), 0)

    def _set_tables(self, table: dict[str, jax.Array]) -> None:
        self.cache = self.cache.replace_tables(table)


def _slots_of_tokens(slots: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    if ids.shape != positions.shape or slots.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"request_ids has shape {ids.shape} and dtype {ids.dtype}: expected integers, one for each of the "
            f"{positions.size} positions"
        )
    if slots.shape != positions.shape:
        if ids.size and not (ids.min() >= 0 and ids.max() < slots.size):
            raise ValueError(f"request_ids reach from {ids.min()} to {ids.max()}: there are {slots.size} request_slots")
        return slots[ids]
    live = slots >= 0
    pairs = {(int(s), int(i)) for s, i in zip(slots[live], ids[live], strict=True)}
    if len(pairs) != len({s for s, _ in pairs}) or len(pairs) != len({i for _, i in pairs}):
        raise ValueError(f"request_ids and request_slots disagree: got the pairs (slot, id) {sorted(pairs)[:8]}")
    return slots
