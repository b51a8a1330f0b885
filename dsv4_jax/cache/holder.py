"""The cache and the host's bookkeeping of it, kept together."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from .host.prefix import PrefixIndex, PrefixPolicy
from .host.requests import RequestTable
from .host.slot import Slot
from .kv_cache import RAN_STEPS, KVCache
from .paged_cache import PagedKVPool
from .stacks import LayerViews
from .state_cache import StateCachePool
from .transfer.consistency import check_cache
from .transfer.debug import fill_blocks, fill_slot
from .transfer.slots import enter_cells

Method = TypeVar("Method", bound=Callable[..., Any])


class StepFault(RuntimeError):
    """Steps ran that should not have."""


def whole(method: Method) -> Method:
    """A method that changes the books as a whole or not at all, whatever interrupts it; none calls another."""

    @functools.wraps(method)
    def call(self: "CacheHolder", *arguments: Any, **options: Any) -> Any:
        self._recover()
        try:
            self._requests.undo.begin()
            result = method(self, *arguments, **options)
            self._requests.undo.done()
            self._opening = None
        except StepFault:
            self._requests.undo.done()
            raise
        except BaseException:
            self._recover()
            raise
        return result

    return call  # type: ignore[return-value]


class CacheHolder:
    """Holds the pytree and the table of requests; what the host changes on the device goes through here."""

    def __init__(
        self,
        cache: KVCache,
        requests: RequestTable,
        *,
        fingerprint: str,
        prefix: PrefixIndex | None,
        debug_nan: bool,
    ):
        """fingerprint: of the model. prefix: what is kept for prompts to come. debug_nan: free blocks and slots are
        kept unreadable (`debug_fill.py`)."""
        self._cache, self._requests, self._debug_nan = cache, requests, debug_nan
        self.fingerprint = fingerprint
        self._ledger = requests.ledger
        self._prefix = prefix
        self._opening: Slot | None = None  # a request that is being filled
        self._chains: dict[int, tuple[tuple[int, bytes], list[bytes]]] = {}  # keys of what a slot's request has kept
        if prefix is not None:
            prefix.undo = requests.undo
            requests.plans_kept_blocks = prefix.policy.name == "zero"
        if debug_nan:
            free = {kind: self._ledger.free_blocks(kind) for kind in self._ledger.kinds}
            self._make_unreadable(free, range(cache.max_requests))

    @property
    def cache(self) -> KVCache:
        """The cache. A step's result is assigned to it, and says which planned steps ran."""
        return self._cache

    @cache.setter
    @whole
    def cache(self, cache: KVCache) -> None:
        given: Any = cache
        if not isinstance(given, KVCache) or _size(given) != _size(self._cache):
            what = "a cache of another size or form" if isinstance(given, KVCache) else f"a {type(given).__name__}"
            raise ValueError(f"manager.cache got {what}: expected the cache that its step returned")
        pending, same = self._requests.pending, cache.ran is self._cache.ran
        self._cache = cache
        pending.caches += not same
        unseen = pending.caches - pending.looked_at
        if pending and unseen >= RAN_STEPS // 2:  # in time, before the cache forgets what ran
            self._look(wait=unseen >= RAN_STEPS - 8)
        self._settle()

    @property
    def paged_pools(self) -> LayerViews:
        """Per layer its PagedKVPool, None for SWA."""

        def view(layer_idx: int) -> PagedKVPool | None:
            cache = self._live_cache()
            kind = cache.schemas[layer_idx].kind
            return cache.paged[kind].layer(cache.layers[layer_idx]) if kind in cache.paged else None

        return LayerViews(len(self.cache.schemas), view)

    @property
    def state_pools(self) -> LayerViews:
        """Per layer its StateCachePool."""

        def view(layer_idx: int) -> StateCachePool:
            cache = self._live_cache()
            return cache.state[cache.schemas[layer_idx].kind].layer(cache.layers[layer_idx])

        return LayerViews(len(self.cache.schemas), view)

    @property
    def max_concurrent_requests(self) -> int:
        """Slots."""
        return self.cache.max_requests

    @property
    def max_context_len(self) -> int:
        """Tokens of one request at most."""
        return self._requests.max_context_len

    @property
    def max_rollback(self) -> int:
        """Tokens that a request can forget at most."""
        return self._requests.max_rollback

    @property
    def active_slots(self) -> list[Slot]:
        """Slots of admitted requests, ascending."""
        self._recover()
        return self._requests.slots

    @property
    def block_size(self) -> int:
        """Tokens a block covers."""
        return self.cache.schemas[0].block_size

    @property
    def prefix_policy(self) -> PrefixPolicy | None:
        """What is kept of prompts for others that begin alike."""
        return None if self._prefix is None else self._prefix.policy

    @whole
    def num_free_blocks(self, kind: str) -> int:
        """Blocks of the "csa" or "hca" pools that can be given out now.

        Those that are only kept for prompts to come count, they go when others need them. Those that a request gave up
        while a planned step was not dispatched yet are not among them until it is.
        """
        return self._num_free(kind)

    def _num_free(self, kind: str) -> int:
        if kind not in self._ledger.kinds:
            raise ValueError(f"kind {kind!r} has no blocks here: expected one of {sorted(self._ledger.kinds)}")
        self._settle(wait=True)
        reclaimable = self._ledger.num_reclaimable(kind) if self._can_reclaim() else 0
        return self._ledger.num_free(kind) + reclaimable

    @whole
    def length(self, slot: int) -> int:
        """Tokens planned for `slot` so far. Those of a plan that was cancelled, or dropped, are none."""
        return self._length(slot)

    def _length(self, slot: int) -> int:
        self._requests.require(slot)
        if self._requests.is_doubtful(slot):
            self._look(wait=not self._requests.pending.probably_ran())
        return self._requests.length(slot)

    def blocks(self, slot: int) -> dict[str, list[int]]:
        """Blocks of `slot` by kind, in order."""
        self._recover()
        self._requests.require(slot)
        return self._ledger.blocks(slot)

    def memory_bytes(self) -> int:
        """Bytes of device memory the cache holds."""
        return self.cache.memory_bytes()

    @whole
    def check(self) -> None:
        """AssertionError unless blocks, tables, lengths and ring rows fit together. Reads the device: for tests."""
        self._look(wait=True)
        self._settle()
        kept = {}
        if self._prefix is not None:
            self._prefix.check()
            kept = self._prefix.blocks()
        check_cache(self._requests, self._live_cache(), kept, free_is_unreadable=self._debug_nan)

    def _recover(self) -> None:
        """Undoes what an interrupted call has changed; may be interrupted and called again."""
        requests = self._requests
        if requests.undo.changed:
            requests.undo.roll_back()
        if (slot := self._opening) is None:
            return
        if slot in requests.ledger and requests.handle(slot).generation == slot.generation:
            requests.undo.begin()
            requests.close(slot, after=0)  # no plan knows of it
            requests.undo.done()
        self._opening = None

    def _fill(self, slot: Slot) -> Slot:
        """A request was opened, whose part of the device is written next: where that fails, it ends."""
        self._opening = slot
        self._requests.undo.keep()
        return slot

    def _live_cache(self) -> KVCache:
        if self._is_donated():
            raise RuntimeError("the cache was donated to a step whose result was not assigned to manager.cache yet")
        return self._cache

    def _is_donated(self) -> bool:
        return any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    def _look(self, *, wait: bool) -> bool:
        """Asks the cache which planned steps ran -> whether it could say.

        wait: for steps in flight; otherwise a cache that is not computed yet says nothing. Raises RuntimeError for
        steps that ran and should not have.
        """
        requests = self._requests
        if not requests.pending:
            return True
        ran: Any = self._cache.ran
        known = len(requests.pending.faults)
        try:
            if self._is_donated() or not (wait or ran.is_ready()):
                return False
            seen = np.array(ran)
        except RuntimeError:  # the step that it comes from failed
            return False
        requests.looked(seen)
        if faults := requests.pending.faults[known:]:
            raise StepFault(f"{faults[0]}: what these requests hold may be wrong, release them")
        return True

    @whole
    def cancel_step(self, number: int) -> None:
        """See `StepPlan.cancel`; number: the plan's."""
        pending = self._requests.pending
        if pending.find(number) is not None:
            self._look(wait=True)
        if pending.has_run(number):
            raise ValueError("the step of this plan has run: roll back instead")
        if (step := pending.find(number)) is not None:
            self._requests.take_back(step)
            self._settle()

    def _settle(self, *, wait: bool = False) -> None:
        """Gives back what was released and no planned step can read any more, once the cache is here to be cleared.

        wait: for steps in flight, to know whether they were those.
        """
        if self._requests.pending and (wait or self._requests.waiting):
            self._look(wait=wait)
        if not self._requests.waiting or self._is_donated():
            return
        self._requests.undo.keep()  # a request whose places are cleared does not come back
        for released in self._requests.settling():
            # An entry that nobody gave a block must find none, not that of a former owner. The device comes first:
            # where it refuses, what was released goes on waiting.
            self._cache = enter_cells(self._cache, self._ledger.entered(released.cells))
            if self._debug_nan:
                self._make_unreadable(released.blocks, released.slots)
            self._requests.free(released)
            self._requests.undo.keep()

    def _can_reclaim(self) -> bool:
        """Whether kept blocks can be given out at once: no planned step may read them, and the cache is here."""
        return self._look(wait=True) and not self._requests.pending and not self._is_donated()

    def _make_room(self, need: dict[str, dict[int, int]]) -> None:
        """Before need[kind][slot] blocks are given out: where they are not free, evicts as many as are missing of those
        that are only kept for prompts to come; nothing where they do not suffice."""
        short = self._ledger.short(need)
        if not short or self._prefix is None or not self._can_reclaim():
            return
        kept_only = self._ledger.kept_only()
        if all(int(kept_only[kind].sum()) >= n for kind, n in short.items()):
            gone = self._prefix.evict({kind: ~alone for kind, alone in kept_only.items()}, short)
            self._requests.give_up(self._ledger.drop(gone))
            self._settle()

    def _make_unreadable(self, blocks: Mapping[str, Sequence[int]], slots: Sequence[int]) -> None:
        for cache in fill_blocks(self._cache, blocks):
            self._cache = cache
        for slot in slots:
            self._cache = fill_slot(self._cache, slot)


def _size(cache: KVCache) -> tuple[Any, ...]:
    """What the shapes of all arrays follow from; asked for in every step, so without looking at each."""
    tables = [table.shape for table in cache.block_table.values()]
    return (
        cache.ran.shape,
        cache.schemas,
        cache.max_requests,
        tables,
        [pool.num_blocks for pool in cache.paged.values()],
    )
