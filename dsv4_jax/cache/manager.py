"""The host's side of the cache: slots, blocks and lengths between jitted steps. Never inside jit."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .cost import cache_cost
from .counts import count, is_integer
from .fingerprint import model_fingerprint
from .geometry import CacheGeometry
from .handle import LayerCacheHandle
from .holder import whole
from .host import planning
from .host.prefix import PrefixIndex, PrefixPolicy, recomputation_reach
from .host.requests import RequestTable
from .kv_cache import KVCache
from .lifecycle import RequestLifecycle
from .new_blocks import forget, is_held, made_by
from .plan import StepPlan, group_tokens
from .schema import build_schema, compute_block_budget
from .transfer.slots import enter_cells

MAX_CONTEXT_LEN = (1 << 31) - 1
"""Most tokens of a request: positions, and the length after the last of them, are int32."""


class KVCacheManager(RequestLifecycle):
    """Builds the cache of a model, hands out its slots and blocks, and plans its steps.

    `cache` is the pytree: a loop takes it, donates it to its jitted step and puts the result back. Everything else here
    is bookkeeping on the host, and every call that fails leaves it as it was. Steps are dispatched in the order in
    which they were planned; they may still run when the host goes on (`pending.py` says why that is safe).

    A request is named by the Slot that admission returns: after its end that handle is an error, never another request.
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
        debug_nan: bool = False,
        fingerprint: str = "",
        hca_tail: str = "full",
        prefix: PrefixPolicy | None = None,
    ):
        """Allocates the cache of all layers of `schedule` (build_schedule(config)).

        num_blocks_per_*_layer: physical blocks (`compute_block_budget` says how many a load needs). max_context_len:
        tokens of one request at most, by default as many as the pools hold blocks for, or one block where they hold
        none; a step's readers look at that many. cache_dtype, indexer_dtype, max_rollback, hca_tail: see
        `build_schema`. debug_nan: free blocks and slots are filled with NaN, so that reading one shows, and `check`
        finds who wrote to one; slow. fingerprint: any text that tells the weights from others of the same
        configuration (see `model_fingerprint`). prefix: what is kept of prompts for others that begin alike
        (`keep_prefix`); by default nothing. Raises ValueError for what does not fit.
        """
        max_concurrent_requests = count("max_concurrent_requests", max_concurrent_requests, least=1)
        schemas = tuple(
            build_schema(
                config, spec, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype, max_rollback=max_rollback,
                hca_tail=hca_tail,
            )
            for spec in schedule
        )  # fmt: skip
        num_blocks = {
            "csa": count("num_blocks_per_csa_layer", num_blocks_per_csa_layer),
            "hca": count("num_blocks_per_hca_layer", num_blocks_per_hca_layer),
        }
        if not schemas:
            raise ValueError("schedule has no layers: expected build_schedule(config)")
        layers = [kind.name.lower() for kind in getattr(config, "geometry", config).layers]
        if [schema.kind for schema in schemas] != layers:
            raise ValueError(
                f"schedule has {len(schemas)} layers that are not the {len(layers)} of config: expected "
                "build_schedule(config)"
            )
        kinds = {s.kind: s for s in schemas if s.entries_per_block}
        if max_context_len is None:
            most = max((num_blocks[k] for k in kinds), default=MAX_CONTEXT_LEN)
            max_context_len = min(max(most, 1) * config.block_size, MAX_CONTEXT_LEN)
        else:
            max_context_len = count("max_context_len", max_context_len, least=1, most=MAX_CONTEXT_LEN)
        self.config = config
        cache = KVCache.allocate(
            schemas,
            max_concurrent_requests,
            num_blocks,
            {k: max(s.blocks_for(max_context_len), 1) for k, s in kinds.items()},
        )
        requests = RequestTable(
            max_concurrent_requests,
            {k: num_blocks[k] for k in kinds},
            kinds,
            max_context_len=max_context_len,
            max_rollback=max_rollback,
            block_size=config.block_size,
            is_held=is_held,
            forget=forget,
        )
        identity = model_fingerprint(config, fingerprint)
        index = None
        if prefix is not None:
            if not isinstance(prefix, PrefixPolicy):
                raise ValueError(f"prefix is {prefix!r}: expected a PrefixPolicy, such as PrefixPolicy('full')")
            index = PrefixIndex(prefix, identity, config.block_size, recomputation_reach(schemas))
        super().__init__(cache, requests, fingerprint=identity, prefix=index, debug_nan=debug_nan)

    @classmethod
    def create(
        cls, geometry: CacheGeometry, *, max_concurrent_requests: int, max_context_len: int, **options: Any
    ) -> "KVCacheManager":
        """A manager for requests of one's own model, with as many blocks as they can need at once.

        Args:
          geometry: what the cache needs to know of the model; `DSV4Config.geometry` is that of a DeepSeek-V4.
          max_concurrent_requests: slots.
          max_context_len: tokens of one request at most.
          **options: the others of `KVCacheManager`, such as `cache_dtype` and `prefix`.

        Raises:
          ValueError: sizes that no cache can have.
        """
        max_context_len = count("max_context_len", max_context_len, least=1, most=MAX_CONTEXT_LEN)
        budget = compute_block_budget(geometry, geometry.schedule, max_context_len, max_concurrent_requests)
        return cls(
            geometry,
            geometry.schedule,
            max_concurrent_requests=max_concurrent_requests,
            num_blocks_per_csa_layer=budget["csa"],
            num_blocks_per_hca_layer=budget["hca"],
            max_context_len=max_context_len,
            **options,
        )

    @classmethod
    def from_memory(
        cls,
        config: Any,
        memory_bytes: float,
        *,
        max_concurrent_requests: int,
        max_context_len: int | None = None,
        **options: Any,
    ) -> "KVCacheManager":
        """A manager whose cache takes at most `memory_bytes`, with as many blocks as that holds.

        max_context_len: tokens of one request at most; the requests share the blocks, which suffice for at least one of
        that length, and for all where the memory does. By default as many as every request can have at once. options:
        the others of KVCacheManager. Raises ValueError when the memory is too small; it says what is missing and what
        would fit.
        """
        given: Any = memory_bytes
        memory_bytes = count(
            "memory_bytes", math.floor(given) if isinstance(given, float) and math.isfinite(given) else given
        )
        sizing = {"cache_dtype", "indexer_dtype", "max_rollback", "hca_tail"} & options.keys()
        cost = cache_cost(config, config.schedule, **{name: options[name] for name in sizing})
        if max_context_len is None:
            longest = config.max_position_embeddings
            max_context_len = max(cost.largest_context(memory_bytes, max_concurrent_requests, longest), 1)
        size = cost.fill(memory_bytes, max_concurrent_requests, max_context_len)
        return cls(
            config,
            config.schedule,
            max_concurrent_requests=max_concurrent_requests,
            num_blocks_per_csa_layer=size.num_blocks.get("csa", 0),
            num_blocks_per_hca_layer=size.num_blocks.get("hca", 0),
            max_context_len=max_context_len,
            **options,
        )

    @whole
    def allocate_block(self, layer_idx: int, request_slot: int) -> int:
        """Gives the request its next block in this layer, and in all layers of its kind, which share one block table.

        Returns the block's id. Raises ValueError for an SWA layer, a slot without a request or a full table,
        RuntimeError (OOM) when no block is free.
        """
        self._requests.require(request_slot)
        kind = self._layer_kind(layer_idx)
        if kind not in self._ledger.kinds:
            raise ValueError(f"layer {layer_idx} is SWA: it has no blocks")
        self._live_cache()
        if self._num_free(kind):  # where the pool is empty, that is the reason to give
            self._check_room(request_slot, kind, len(self._ledger.blocks(request_slot)[kind]) + 1)
        self._make_room({kind: {request_slot: 1}})
        rows = self._ledger.extend({kind: {request_slot: 1}})
        cells = {kind: [(slot, column) for slot, column, _ in rows[kind]]}
        self._requests.undo.note(self._requests.entered_in_vain, cells)
        self._cache = enter_cells(self._cache, rows)
        return rows[kind][0][2]

    # Steps.

    @whole
    def plan_step(
        self,
        request_slots: Any,
        positions: Any,
        *,
        lookahead: int = 0,
        limits: Any = None,
        num_segments: int | None = None,
        width: int | None = None,
        max_blocks: int | None = None,
    ) -> StepPlan:
        """Plans a step of T tokens and gives out the blocks it needs, all of them or none.

        request_slots, positions: (T,) integers in any order, slot -1 for padding, or one Slot for all positions, of
        which those below 0 are padding; a request's tokens follow those it has. lookahead: tokens more per request that
        the blocks must suffice for, so that a loop can go on without the host, which afterwards calls `advance`; limits
        (T,): but no more than the token's request will ever have.
        num_segments, width: sizes to pad the grouping to, where tokens of one slot come together (see `group_tokens`).
        Raises ValueError for slots without a request or bad positions, RuntimeError (OOM) when the blocks do not
        suffice; then nothing changed.

        The step is outstanding until it ran, as the cache that comes back says, or until the plan is cancelled, or it
        and all its copies are gone; then, if it did not run, the requests are as they were before. Blocks and slots
        given up meanwhile are not given to others, and the requests in it cannot be copied. Steps of one request run in
        the order of their plans, those of different requests in any.
        """
        self._settle()
        options: dict[str, Any] = {
            "lookahead": lookahead, "limits": limits, "num_segments": num_segments, "width": width,
            "max_blocks": max_blocks,
        }  # fmt: skip
        try:
            step = planning.prepare_step(self._requests, request_slots, positions, **options)
        except ValueError:
            if not self._requests.pending or not self._look(wait=True):
                raise
            step = planning.prepare_step(self._requests, request_slots, positions, **options)  # what is known now
        try:
            self._make_room(step.need)
            plan = step.commit()
        except RuntimeError:
            if not self._requests.waiting:
                raise
            self._settle(wait=True)
            self._make_room(step.need)
            plan = step.commit()
        made_by(plan, self)
        return plan

    def acquire(self, layer_idx: int, request_slots: Any, positions: Any, request_ids: Any = None) -> LayerCacheHandle:
        """A handle on one layer for T tokens; allocates neither device memory nor blocks (`allocate_block` does).

        A loop that writes through it assigns the handle's cache to `manager.cache`, and tells with `advance` how many
        tokens the request has more: snapshots, rollback and forks go by that.
        request_slots, positions: (T,) integers, token-major in any order, slot -1 for padding. request_ids: (T,)
        integers, equal where tokens belong to one request: a check that no two requests got one slot. With fewer
        request_slots (R,) than positions, request_ids says for each token which of them is its own. Raises ValueError
        when these do not fit together. Writing entries through the handle raises RuntimeError where they have no block,
        or one that another request reads too.
        """
        kind = self._layer_kind(layer_idx)
        planning.check_handles(self._requests, request_slots)
        slots = np.asarray(request_slots)
        if request_ids is not None:
            slots = planning.slots_of_tokens(slots, np.asarray(positions), np.asarray(request_ids))
        slots, positions = planning.check_tokens(self._requests, slots, positions)
        plan = StepPlan(slots, positions, group_tokens(slots, positions), kept_blocks=self._requests.kept_blocks())
        reason = planning.why_unwritable(self._requests, layer_idx, kind, slots, positions)
        return LayerCacheHandle(self._live_cache(), plan, layer_idx, unallocated=reason)

    # Checks.

    def _layer_kind(self, layer_idx: int) -> str:
        if not is_integer(layer_idx) or not 0 <= layer_idx < len(self.cache.schemas):
            raise ValueError(f"layer {layer_idx!r}: the model has layers 0 to {len(self.cache.schemas) - 1}")
        return self.cache.schemas[layer_idx].kind

    def _check_room(self, slot: int, kind: str, blocks: int) -> None:
        columns = self.cache.block_table[kind].shape[1]
        if blocks > columns:
            raise ValueError(
                f"slot {slot} needs {blocks} {kind.upper()} blocks: max_context_len = {self.max_context_len} allows "
                f"{columns}"
            )
