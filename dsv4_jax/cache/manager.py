"""The host's side of the cache: slots, blocks and lengths between jitted steps. Never inside jit."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np

from .books import Books, whole
from .cost import cache_cost
from .counts import count, is_integer
from .geometry import CacheGeometry
from .handle import LayerCacheHandle
from .holder import CacheHolder
from .host import planning
from .host.blocks import out_of_blocks
from .host.prefix import AdmittedPrompt, PrefixIndex, PrefixPolicy, recomputation_reach, token_array
from .host.requests import RequestTable
from .host.slot import Slot
from .kv_cache import KVCache
from .new_blocks import made_by
from .plan import StepPlan, group_tokens
from .schema import build_schema, compute_block_budget
from .stacks import LayerViews
from .transfer.snapshot import Snapshot, require_fit, take_snapshot
from .transfer.state_rows import read_rows

MAX_CONTEXT_LEN = (1 << 31) - 1
"""Most tokens of a request: positions, and the length after the last of them, are int32."""


class CacheOptions(TypedDict, total=False):
    """What every way to make a manager takes; `KVCacheManager` says what it means."""

    cache_dtype: str
    indexer_dtype: str | None
    max_rollback: int
    debug_nan: bool
    fingerprint: str
    hca_tail: str
    prefix: PrefixPolicy | None


class ManagerOptions(CacheOptions):
    """What `KVCacheManager` takes besides the model."""

    max_concurrent_requests: int
    num_blocks_per_csa_layer: int
    num_blocks_per_hca_layer: int
    max_context_len: NotRequired[int | None]


class KVCacheManager:
    """Builds the cache of a model, hands out its slots and blocks, and plans its steps.

    `cache` is the pytree: a loop takes it, donates it to its jitted step and puts the result back. Everything else here
    is bookkeeping on the host, and every call that fails leaves it as it was. Steps are dispatched in the order in
    which they were planned, and the host may continue while they run (`host/in_flight.py` says why that is safe).

    A request is named by the Slot that admission returns: after its end that handle is an error, never another request.

    Attributes:
      config: the model, as it was given.
      fingerprint: 64 hexadecimal digits that tell the model from others.
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
        """Allocates the cache of all layers of `schedule`.

        Args:
          config: the model: a DSV4Config or a CacheGeometry.
          schedule: its layers, `build_schedule(config)`.
          max_concurrent_requests: slots.
          num_blocks_per_csa_layer: physical blocks; `compute_block_budget` says how many a load needs.
          num_blocks_per_hca_layer: the same of HCA layers.
          max_context_len: tokens of one request at most; readers of a step look at that many. By default as many as
            the pools hold blocks for, or one block where they hold none.
          cache_dtype, indexer_dtype, max_rollback, hca_tail: see `build_schema`.
          debug_nan: whether free blocks and slots are filled with NaN, so that a read of one shows and `check` finds a
            write to one; slow.
          fingerprint: any text that tells the weights from others of the same configuration.
          prefix: what is cached of prompts for others that begin alike (`keep_prefix`); by default nothing.

        Raises:
          ValueError: for what does not fit.
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
        )
        self.fingerprint = model_fingerprint(config, fingerprint)
        index = None
        if prefix is not None:
            if not isinstance(prefix, PrefixPolicy):
                raise ValueError(f"prefix is {prefix!r}: expected a PrefixPolicy, such as PrefixPolicy('full')")
            index = PrefixIndex(prefix, self.fingerprint, config.block_size, recomputation_reach(schemas))
        self._books = Books(CacheHolder(cache, debug_nan=debug_nan), requests, index)

    @classmethod
    def create(
        cls,
        geometry: CacheGeometry,
        *,
        max_concurrent_requests: int,
        max_context_len: int,
        **options: Unpack[CacheOptions],
    ) -> "KVCacheManager":
        """A manager for requests of one's own model, with as many blocks as they can need at once.

        Args:
          geometry: what the cache needs to know of the model; `DSV4Config.geometry` is that of a DeepSeek-V4.
          max_concurrent_requests: slots.
          max_context_len: tokens of one request at most.
          **options: cache_dtype, indexer_dtype, max_rollback, debug_nan, fingerprint, hca_tail and prefix, as for
            `KVCacheManager`.

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
        **options: Unpack[CacheOptions],
    ) -> "KVCacheManager":
        """A manager whose cache takes at most `memory_bytes`, with as many blocks as that holds.

        Args:
          config: the model: a DSV4Config.
          memory_bytes: of device memory.
          max_concurrent_requests: slots.
          max_context_len: tokens of one request at most; the requests share the blocks, which suffice for at least one
            of that length, and for all where the memory does. By default as many as every request can have at once.
          **options: as for `create`.

        Raises:
          ValueError: the memory is too small; says what is missing and what would fit.
        """
        given: Any = memory_bytes
        memory_bytes = count(
            "memory_bytes", math.floor(given) if isinstance(given, float) and math.isfinite(given) else given
        )
        names = {"cache_dtype", "indexer_dtype", "max_rollback", "hca_tail"}
        sizing: dict[str, Any] = {name: value for name, value in options.items() if name in names}
        cost = cache_cost(config, config.schedule, **sizing)
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

    # The cache, and its sizes.

    @property
    def cache(self) -> KVCache:
        """The cache. A step's result is assigned to it, and says which planned steps ran."""
        return self._books.holder.cache

    @cache.setter
    @whole
    def cache(self, cache: KVCache) -> None:
        self._books.assign(cache)

    @property
    def paged_pools(self) -> LayerViews:
        """Per layer its PagedKVPool, None for SWA."""
        return self._books.holder.pools

    @property
    def state_pools(self) -> LayerViews:
        """Per layer its StateCachePool."""
        return self._books.holder.states

    def memory_bytes(self) -> int:
        """Bytes of device memory the cache holds."""
        return self.cache.memory_bytes()

    @property
    def max_concurrent_requests(self) -> int:
        """Slots."""
        return self.cache.max_requests

    @property
    def max_context_len(self) -> int:
        """Tokens of one request at most."""
        return self._books.requests.max_context_len

    @property
    def max_rollback(self) -> int:
        """Tokens that a request can forget at most."""
        return self._books.requests.max_rollback

    @property
    def block_size(self) -> int:
        """Tokens a block covers."""
        return self.cache.schemas[0].block_size

    @property
    def prefix_policy(self) -> PrefixPolicy | None:
        """What is cached of prompts for others that begin alike."""
        return None if self._books.prefix is None else self._books.prefix.policy

    @property
    def active_slots(self) -> list[Slot]:
        """Slots of admitted requests, ascending."""
        self._books.recover()
        return self._books.requests.slots

    @whole
    def num_free_blocks(self, kind: str) -> int:
        """Blocks of the "csa" or "hca" pools that can be given out now.

        Blocks that are only cached for later prompts count: they are evicted when others need them. Released blocks
        become free when every plan made before the release was dispatched, or will not be.
        """
        return self._books.num_free(kind)

    @whole
    def length(self, slot: int) -> int:
        """Tokens planned for `slot` so far. Those of a plan that was cancelled, or dropped, are none."""
        return self._books.length(slot)

    def blocks(self, slot: int) -> dict[str, list[int]]:
        """Blocks of `slot` by kind, in order."""
        self._books.recover()
        self._books.requests.require(slot)
        return self._books.ledger.blocks(slot)

    @whole
    def check(self) -> None:
        """AssertionError unless blocks, tables, lengths and ring rows fit together. Reads the device: for tests."""
        self._books.check()

    @whole
    def reset(self) -> None:
        """Starts again with an empty cache, after the one there was is lost: donated to a step that failed.

        All requests end, their handles are errors from now on, and nothing of prompts stays cached.
        """
        old = self._books
        self._books = old.emptied()  # one assignment: whatever interrupts this finds the old state or the new one
        old.forget()

    # Requests start and end.

    @whole
    def admit_request(self) -> Slot:
        """Admits a request without tokens.

        Returns:
          The slot that has been free longest.

        Raises:
          RuntimeError: all slots are taken.
        """
        requests = self._books.requests
        self._books.collect(wait=not requests.free_slots)
        return requests.open()

    @whole
    def admit_prompt(self, token_ids: Any, *, salt: bytes = b"") -> AdmittedPrompt:
        """Admits a request for a prompt, with the longest beginning that `keep_prefix` cached under the same salt.

        Feed the tokens from `start` on, at least one; the last one's logits are those of a prompt computed from its
        beginning. A manager without a prefix policy finds nothing.

        Args:
          token_ids: (n,) integers.
          salt: prompts under different salts share nothing.

        Returns:
          The slot, where to start, how many tokens were found and how many of those are computed again.

        Raises:
          ValueError: the prompt is empty or longer than max_context_len.
          RuntimeError: no slot is free.
        """
        books, requests = self._books, self._books.requests
        ids = token_array(token_ids)
        if not 0 < len(ids) <= requests.max_context_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens: expected 1 to {requests.max_context_len} (max_context_len)"
            )
        books.collect(wait=not requests.free_slots)
        match = None if books.prefix is None else books.prefix.find(ids, salt, books.ledger.kinds)
        if match is None:
            return AdmittedPrompt(requests.open(), 0, 0, 0)
        books.holder.live()
        slot = books.filling(requests.adopt(match.blocks, match.start))
        books.holder.write_state(slot, match.state or {}, match.start)
        books.holder.enter(books.ledger.all_entered(slot))
        return AdmittedPrompt(slot, match.start, match.hit_tokens, match.hit_tokens - match.start)

    def shareable_blocks(self, token_ids: Any, *, salt: bytes = b"") -> dict[str, int]:
        """By how many blocks `admit_prompt` would leave more free than a prompt needs that shares nothing.

        Args:
          token_ids: (n,) integers, a prompt.
          salt: as for `admit_prompt`.

        Returns:
          By kind, blocks that other requests hold and the prompt begins with. Cached blocks that nobody holds do not
          count: `num_free_blocks` counts them as free. Nothing changes.
        """
        prefix, ledger = self._books.prefix, self._books.ledger
        match = None if prefix is None else prefix.find(token_array(token_ids), salt, ledger.kinds, peek=True)
        if match is None:
            return dict.fromkeys(ledger.kinds, 0)
        return {kind: int((~alone[match.blocks[kind]]).sum()) for kind, alone in ledger.kept_only().items()}

    def found_tokens(self, token_ids: Any, *, salt: bytes = b"") -> int:
        """How many tokens of a prompt `admit_prompt` would find in cached blocks; nothing changes."""
        prefix, ledger = self._books.prefix, self._books.ledger
        match = None if prefix is None else prefix.find(token_array(token_ids), salt, ledger.kinds, peek=True)
        return 0 if match is None else match.hit_tokens

    @whole
    def keep_prefix(self, slot: int, token_ids: Any, *, salt: bytes = b"") -> int:
        """Caches the full blocks of a request for prompts that begin alike.

        What the policy keeps beside the blocks is read from the device where ring and tails still have it: call this
        when the request's length is a multiple of block_size, or at most max_rollback tokens later. The request cannot
        be rolled back into cached blocks.

        Args:
          slot: the request's.
          token_ids: (n,) integers, the request's tokens or the first of them.
          salt: only prompts under the same salt find the blocks.

        Returns:
          How many tokens the cached blocks hold: 0 without a prefix policy, or where the request's blocks are cached
          under another salt.

        Raises:
          ValueError: the slot holds no request, or one with a planned step that was not dispatched.
        """
        books, requests, prefix = self._books, self._books.requests, self._books.prefix
        books.require_written(slot)
        if prefix is None:
            return 0
        cache = books.holder.live()
        handle, size = requests.handle(int(slot)), self.block_size
        keys = prefix.keys_of(handle, token_array(token_ids)[: requests.length(slot)], salt)
        # A block is one text's: what a request shares with a text under another salt is not cached twice.
        if books.ledger.any_kept(slot, prefix.num_known(keys), len(keys)):
            return 0
        pinned = requests.pinned(slot)
        books.ledger.keep(prefix.add(keys, books.ledger.blocks(slot)))
        for end in range(max(-(-pinned // size), 1) * size, len(keys) * size + 1, size):
            if prefix.lacks_state(keys[end // size - 1], end):
                prefix.keep_state(keys[end // size - 1], read_rows(cache, slot, end, end))
        requests.pin_until(slot, len(keys) * size)
        prefix.note_keys(handle, salt, keys)
        return len(keys) * size

    @whole
    def release_request(self, slot: int) -> None:
        """Ends the request of `slot`, at any moment: its blocks and the slot are free again.

        Where a planned step was not dispatched yet, they become free when it is.

        Args:
          slot: the request's.

        Raises:
          ValueError: the slot holds no request.
        """
        self._books.requests.require(slot)
        self._books.requests.release(slot)
        self._books.collect()

    @whole
    def rollback(self, slot: int, n: int) -> None:
        """Forgets the last n tokens of a request and frees the blocks beyond. O(blocks), nothing is copied.

        The next tokens are written as if those had never been there: their rows lie in the slack of ring and tails, and
        readers go by position.

        Args:
          slot: the request's.
          n: tokens.

        Raises:
          ValueError: n is more than the request's length, or goes back further than max_rollback tokens from the newest
            that the request ever had.
        """
        requests = self._books.requests
        requests.require(slot)
        if not is_integer(n):
            raise ValueError(f"the number of tokens is {n!r}: expected an integer, 0 or more")
        length = self._books.length(slot)
        most = max(length - requests.pinned(slot), 0)
        if not 0 <= n <= most:
            raise ValueError(
                f"slot {slot}: cannot roll back {n} tokens: it has {length} and max_rollback is {self.max_rollback}, "
                f"counted from the newest token it ever had: expected 0 to {most}"
            )
        requests.truncate(slot, length - int(n))
        self._books.collect()

    @whole
    def fork(self, slot: int) -> Slot:
        """Admits a second request with the same tokens so far; the two continue independently.

        Blocks that neither will write again are shared by reference count, the others and the state row are copied.

        Args:
          slot: the request's.

        Returns:
          The slot of the second request.

        Raises:
          ValueError: the slot holds no request, or one with a planned step that was not dispatched.
          RuntimeError: no slot, or too few blocks are free.
        """
        books, requests = self._books, self._books.requests
        books.require_written(slot)
        books.holder.live()
        books.collect(wait=bool(requests.waiting))
        pinned = requests.pinned(slot) // self.block_size
        owned = books.ledger.blocks(slot)
        shared = {kind: min(pinned, len(ids)) for kind, ids in owned.items()}
        if requests.free_slots:
            books.make_room({kind: {slot: len(ids) - shared[kind]} for kind, ids in owned.items()})
        target, copies = requests.fork(slot, shared)
        # At most the open block and what a rollback reaches back to: a fixed number, so that forks compile once.
        most = -(-self.max_rollback // self.block_size) + 1
        books.holder.copy(slot, books.filling(target), copies, most)
        return target

    @whole
    def snapshot(self, slot: int, *, rollback: int = 0) -> Snapshot:
        """Copies the request of `slot` out of the cache; the request continues. Waits for steps in flight.

        Args:
          slot: the request's.
          rollback: tokens that can be forgotten after it is restored; what that takes is part of the snapshot.

        Returns:
          The request in numpy arrays.

        Raises:
          ValueError: the slot holds no request, or one with a planned step that was not dispatched, or the request has
            fewer tokens to roll back.
        """
        return self._take_snapshot(slot, rollback)

    def _take_snapshot(self, slot: int, rollback: int) -> Snapshot:
        books, requests = self._books, self._books.requests
        books.require_written(slot)
        rollback = count("rollback", rollback)
        length = requests.length(slot)
        most = length - requests.pinned(slot)
        if rollback > most:
            raise ValueError(f"rollback is {rollback}: slot {slot} can go back by 0 to {most} tokens")
        cache, blocks = books.holder.live(), books.ledger.blocks(slot)
        return take_snapshot(cache, slot, length, blocks, rollback=rollback, fingerprint=self.fingerprint)

    @whole
    def restore(self, snapshot: Snapshot) -> Slot:
        """Admits a request that continues where the snapshot was taken, on this manager or one of another size.

        It can be rolled back by the snapshot's `rollback`, at most by this manager's.

        Args:
          snapshot: of the same model and records.

        Returns:
          The request's slot.

        Raises:
          ValueError: the snapshot is of another model or other records, or longer than max_context_len.
          RuntimeError: no slot, or too few blocks are free.
        """
        books, requests = self._books, self._books.requests
        books.holder.live()
        books.collect(wait=bool(requests.waiting))
        self.check_restorable(snapshot)
        pinned = snapshot.length - min(snapshot.rollback, self.max_rollback)
        if requests.free_slots:
            books.make_room({kind: {0: n} for kind, n in requests.blocks_for(snapshot.length).items()})
        slot = books.filling(requests.open(snapshot.length, pinned))
        books.holder.write_snapshot(slot, snapshot, books.ledger.blocks(slot))
        books.holder.enter(books.ledger.all_entered(slot))
        return slot

    def check_restorable(self, snapshot: Snapshot) -> None:
        """ValueError, with the reason, for a snapshot that `restore` would refuse whatever is free."""
        require_fit(snapshot, self.cache, self.fingerprint, self.max_context_len)

    @whole
    def preempt(self, slot: int, *, rollback: int = 0) -> Snapshot:
        """Takes a request out of the cache to make room; `restore` resumes it. See `snapshot`, `release_request`."""
        snapshot = self._take_snapshot(slot, rollback)
        # Its blocks become free in the next call that needs room: no work on the device, which could fail, stands
        # between the request's end and the snapshot.
        self._books.requests.release(slot)
        return snapshot

    # Steps.

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

        The step is outstanding until it ran, as the cache that comes back says, or until the plan is cancelled, or it
        and all its copies are gone; then, if it did not run, the requests are as they were before. Blocks and slots
        released meanwhile are not given to others, and the requests in it cannot be copied. Steps of one request run in
        the order of their plans, those of different requests in any.

        Args:
          request_slots: (T,) integers in any order, -1 for padding, or one Slot for all positions, of which those below
            0 are padding.
          positions: (T,) integers; a request's tokens follow those it has.
          lookahead: tokens per request beyond these that the blocks must suffice for, so that a loop can continue
            without the host; it calls `advance` afterwards.
          limits: (T,) integers: tokens that the token's request will have at most, where lookahead would give more.
          num_segments, width: sizes to pad the grouping to, where several tokens are of one slot (see `group_tokens`).
          max_blocks: blocks of a request that readers look at, by default all that a table has.

        Returns:
          The plan, an operand of the step.

        Raises:
          ValueError: slots without a request, or bad positions.
          RuntimeError: the blocks do not suffice (OOM).
        """
        sizes = planning.StepSizes(lookahead, limits, num_segments, width, max_blocks)
        return self._plan_step(request_slots, positions, sizes)

    @whole
    def _plan_step(self, request_slots: Any, positions: Any, sizes: planning.StepSizes) -> StepPlan:
        plan = self._books.plan_step(request_slots, positions, sizes)
        made_by(plan, self)
        return plan

    @whole
    def cancel_step(self, number: int) -> None:
        """See `StepPlan.cancel`; number: the plan's."""
        self._books.cancel_step(number)

    @whole
    def _require_step(self, request_slots: np.ndarray, positions: np.ndarray, sizes: planning.StepSizes) -> None:
        """Raises what `plan_step` would raise; nothing is given out."""
        for kind, need in self._books.prepare_step(request_slots, positions, sizes).need.items():
            asked, free = sum(need.values()), self._books.num_free(kind)
            if asked > free:
                raise RuntimeError(out_of_blocks(kind, asked, free))

    @whole
    def advance(self, slot: int, n: int) -> None:
        """Counts n more tokens for `slot`, which a loop wrote beyond its plan (see `plan_step`'s lookahead).

        A loop that wrote more than it keeps counts all of them, then rolls the rest back.

        Args:
          slot: the request's.
          n: tokens.

        Raises:
          ValueError: the request would be longer than max_context_len, or than the blocks that plans gave out.
        """
        requests = self._books.requests
        length = self._books.length(slot)
        end = length + count("the number of tokens", n)
        if end > self.max_context_len:
            raise ValueError(
                f"slot {slot}: {n} tokens more than {length}: a request has at most {self.max_context_len} "
                "(max_context_len)"
            )
        for kind in self._books.ledger.kinds:
            if requests.missing(kind, slot, end):
                raise ValueError(f"slot {slot}: {end} tokens need {kind.upper()} blocks that no plan gave out")
        requests.grow(slot, end)

    # A layer without a plan.

    @whole
    def allocate_block(self, layer_idx: int, request_slot: int) -> int:
        """Gives the request its next block in this layer, and in all layers of its kind, which share one block table.

        Args:
          layer_idx: a CSA or HCA layer.
          request_slot: the request's slot.

        Returns:
          The block's id.

        Raises:
          ValueError: an SWA layer, a slot without a request, or a full table.
          RuntimeError: no block is free (OOM).
        """
        books, slot = self._books, request_slot
        books.requests.require(slot)
        kind = self._layer_kind(layer_idx)
        if kind not in books.ledger.kinds:
            raise ValueError(f"layer {layer_idx} is SWA: it has no blocks")
        books.holder.live()
        if books.num_free(kind):  # where the pool is empty, that is the reason to give
            blocks, columns = len(books.ledger.blocks(slot)[kind]) + 1, self.cache.block_table[kind].shape[1]
            if blocks > columns:
                raise ValueError(
                    f"slot {slot} needs {blocks} {kind.upper()} blocks: max_context_len = {self.max_context_len} "
                    f"allows {columns}"
                )
        need = {kind: {slot: 1}}
        books.make_room(need)
        rows = books.ledger.extend(need)
        books.requests.undo.note(books.requests.entered_in_vain, {kind: [row[:2] for row in rows[kind]]})
        books.holder.enter(rows)
        return rows[kind][0][2]

    def acquire(self, layer_idx: int, request_slots: Any, positions: Any, request_ids: Any = None) -> LayerCacheHandle:
        """A handle on one layer for T tokens; allocates neither device memory nor blocks (`allocate_block` does).

        A loop that writes through it assigns the handle's cache to `manager.cache`, and tells with `advance` how many
        more tokens the request has: snapshots, rollback and forks go by that. Writing entries through the handle raises
        RuntimeError where they have no block, or one that another request reads too.

        Args:
          layer_idx: the layer.
          request_slots: (T,) integers, token-major in any order, -1 for padding; with request_ids possibly fewer, (R,).
          positions: (T,) integers.
          request_ids: (T,) integers, equal where tokens belong to one request: a check that no two requests got one
            slot. With request_slots (R,) they say for each token which of those is its own.

        Returns:
          The handle.

        Raises:
          ValueError: these do not fit together.
        """
        requests = self._books.requests
        kind = self._layer_kind(layer_idx)
        planning.check_handles(requests, request_slots)
        slots = np.asarray(request_slots)
        if request_ids is not None:
            slots = planning.slots_of_tokens(slots, np.asarray(positions), np.asarray(request_ids))
        slots, positions = planning.check_tokens(requests, slots, positions)
        plan = StepPlan(slots, positions, group_tokens(slots, positions), kept_blocks=requests.kept_blocks())
        reason = planning.why_unwritable(requests, layer_idx, kind, slots, positions)
        return LayerCacheHandle(self._books.holder.live(), plan, layer_idx, unallocated=reason)

    def _layer_kind(self, layer_idx: int) -> str:
        if not is_integer(layer_idx) or not 0 <= layer_idx < len(self.cache.schemas):
            raise ValueError(f"layer {layer_idx!r}: the model has layers 0 to {len(self.cache.schemas) - 1}")
        return self.cache.schemas[layer_idx].kind


def model_fingerprint(config: Any, weights: str = "") -> str:
    """64 hexadecimal digits that follow from a configuration (a dataclass) and a fingerprint of the weights.

    weights: whatever text its owner gives the weights, such as a hash of the files; two models with equal
    configurations and texts are taken for the same.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    text = json.dumps([fields, weights], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
