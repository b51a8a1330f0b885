"""The books of a cache: its requests and cached prompts, kept in step with what the device holds."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from .holder import CacheHolder
from .host.planning import PreparedStep, StepSizes, prepare_step
from .host.prefix import PrefixIndex
from .host.requests import RequestTable
from .host.slot import Slot
from .kv_cache import RAN_STEPS, KVCache
from .new_blocks import forget, is_held
from .plan import StepPlan
from .transfer.debug import check_cache


class StepFault(RuntimeError):
    """Steps ran that should not have."""


class KeepsBooks(Protocol):
    """Whose methods may be `whole`."""

    _books: "Books"


Owner = TypeVar("Owner", bound=KeepsBooks)
P = ParamSpec("P")
T = TypeVar("T")


def whole(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """A method that changes the books as a whole or not at all, whatever interrupts it; none calls another."""

    @functools.wraps(method)
    def call(self: Owner, *arguments: P.args, **options: P.kwargs) -> T:
        self._books.recover()
        try:
            self._books.requests.undo.begin()
            result = method(self, *arguments, **options)
            self._books.done()
        except StepFault:
            self._books.requests.undo.done()
            raise
        except BaseException:
            self._books.recover()
            raise
        return result

    return call


class Books:
    """Joins what the host knows (`host/`) with the cache (`CacheHolder`); methods are called inside a `whole` one.

    Attributes:
      holder: the cache.
      requests: slots, lengths, blocks and planned steps.
      prefix: what is cached of prompts, None where nothing is.
    """

    def __init__(self, holder: CacheHolder, requests: RequestTable, prefix: PrefixIndex | None):
        self.holder, self.requests, self.prefix = holder, requests, prefix
        self.ledger = requests.ledger
        self._opening: Slot | None = None  # a request that is being filled
        if prefix is not None:
            prefix.undo = requests.undo
            requests.plans_kept_blocks = prefix.policy.name == "zero"
        free = {kind: self.ledger.free_blocks(kind) for kind in self.ledger.kinds}
        holder.make_unreadable(free, range(requests.num_slots))

    def emptied(self) -> "Books":
        """Books of the same sizes without requests and cached prompts, over an empty cache."""
        prefix = None if self.prefix is None else self.prefix.emptied()
        return Books(self.holder.emptied(), self.requests.emptied(), prefix)

    def forget(self) -> None:
        """Other books took the place of these: nobody asks for their plans any more."""
        for number in self.requests.pending.numbers:
            forget(number)

    # Calls that succeed as a whole or change nothing.

    def done(self) -> None:
        """All changes of the call are made."""
        self.requests.undo.done()
        self._opening = None

    def recover(self) -> None:
        """Undoes what an interrupted call has changed; may be interrupted and called again."""
        requests = self.requests
        if requests.undo.changed:
            requests.undo.roll_back()
        if (slot := self._opening) is None:
            return
        if slot in requests.ledger and requests.handle(slot).generation == slot.generation:
            requests.undo.begin()
            requests.release(slot, after=0)  # no plan knows of it
            requests.undo.done()
        self._opening = None

    def filling(self, slot: Slot) -> Slot:
        """A request was opened, whose part of the device is written next: where that fails, it ends."""
        self._opening = slot
        self.requests.undo.keep()
        return slot

    # What ran, and what is free.

    def assign(self, cache: KVCache) -> None:
        """A step's result takes the place of the cache."""
        self.holder.require_same_size(cache)
        pending, same = self.requests.pending, cache.ran is self.holder.cache.ran
        self.holder.cache = cache
        pending.caches += not same
        unseen = pending.caches - pending.looked_at
        if pending and unseen >= RAN_STEPS // 2:  # in time, before the cache forgets what ran
            self.look(wait=unseen >= RAN_STEPS - 8)
        self.collect()

    def observe(self) -> None:
        """Tells the books of which plans no array exists."""
        pending = self.requests.pending
        pending.observe(number for number in pending.numbers if not is_held(number))

    def look(self, *, wait: bool) -> bool:
        """Asks the cache which planned steps ran -> whether it could say.

        wait: for steps in flight; otherwise a cache that is not computed yet says nothing. Raises RuntimeError for
        steps that ran and should not have.
        """
        requests = self.requests
        if not requests.pending:
            return True
        known = len(requests.pending.faults)
        ran = self.holder.ran(wait=wait)
        if ran is None:
            return False
        self.observe()
        requests.looked(ran)
        if faults := requests.pending.faults[known:]:
            raise StepFault(f"{faults[0]}: what these requests hold may be wrong, release them")
        return True

    def collect(self, *, wait: bool = False) -> None:
        """Frees what was released and no planned step can still read, once the cache is here to be cleared.

        wait: for steps in flight, to know whether they were those.
        """
        if self.requests.pending and (wait or self.requests.waiting):
            self.look(wait=wait)
        if not self.requests.waiting or self.holder.is_donated:
            return
        self.observe()
        self.requests.undo.keep()  # a request whose places are cleared does not come back
        for released in self.requests.collectable():
            # An entry that nobody gave a block must find none, not that of a former owner. The device comes first:
            # where it refuses, what was released keeps waiting.
            self.holder.enter(self.ledger.entered(released.cells))
            self.holder.make_unreadable(released.blocks, released.slots)
            self.requests.free(released)
            self.requests.undo.keep()

    def length(self, slot: int) -> int:
        """Tokens planned for `slot`, without those of plans that will not run."""
        self.requests.require(slot)
        if self.requests.pending:
            self.observe()
            if self.requests.is_doubtful(slot):
                self.look(wait=not self.requests.pending.probably_ran())
        return self.requests.length(slot)

    def require_written(self, slot: int) -> None:
        """See `RequestTable.require_written`; asks the cache first, where that matters."""
        self.requests.require(slot)
        if self.requests.pending.involves(slot):
            self.look(wait=True)
        self.requests.require_written(slot)

    def num_free(self, kind: str) -> int:
        """Blocks of a kind that can be given out now, with those that are only cached."""
        if kind not in self.ledger.kinds:
            raise ValueError(f"kind {kind!r} has no blocks here: expected one of {sorted(self.ledger.kinds)}")
        self.collect(wait=True)
        return self.ledger.num_free(kind) + (self.ledger.num_reclaimable(kind) if self._can_evict() else 0)

    def _can_evict(self) -> bool:
        """Whether cached blocks can be given out at once: no planned step may read them, and the cache is here."""
        return self.look(wait=True) and not self.requests.pending and not self.holder.is_donated

    def make_room(self, need: dict[str, dict[int, int]]) -> None:
        """Before need[kind][slot] blocks are given out: where they are not free, evicts as many cached ones as are
        missing; nothing where those do not suffice."""
        short = self.ledger.short(need)
        if not short or self.prefix is None or not self._can_evict():
            return
        kept_only = self.ledger.kept_only()
        if all(int(kept_only[kind].sum()) >= n for kind, n in short.items()):
            gone = self.prefix.evict({kind: ~alone for kind, alone in kept_only.items()}, short)
            self.requests.hold(self.ledger.evict(gone))
            self.collect()

    # Steps.

    def prepare_step(self, request_slots: Any, positions: Any, sizes: StepSizes) -> PreparedStep:
        """See `planning.prepare_step`; asks the cache first where plans that are gone matter."""
        try:
            return prepare_step(self.requests, request_slots, positions, sizes)
        except ValueError:
            if not self.requests.pending or not self.look(wait=True):
                raise
            return prepare_step(self.requests, request_slots, positions, sizes)  # what is known now

    def plan_step(self, request_slots: Any, positions: Any, sizes: StepSizes) -> StepPlan:
        """See `KVCacheManager.plan_step`."""
        self.collect()
        step = self.prepare_step(request_slots, positions, sizes)
        for number in self.requests.pending.known:
            forget(number)
        self.requests.pending.forget_known()
        try:
            self.make_room(step.need)
            return step.commit()
        except RuntimeError:
            if not self.requests.waiting:
                raise
            self.collect(wait=True)
            self.make_room(step.need)
            return step.commit()

    def cancel_step(self, number: int) -> None:
        """See `StepPlan.cancel`; number: the plan's."""
        pending = self.requests.pending
        if pending.find(number) is not None:
            self.look(wait=True)
        if pending.has_run(number):
            raise ValueError("the step of this plan has run: roll back instead")
        if (step := pending.find(number)) is not None:
            self.requests.take_back(step)
            self.collect()

    def check(self) -> None:
        """See `KVCacheManager.check`."""
        self.look(wait=True)
        self.collect()
        kept = {}
        if self.prefix is not None:
            self.prefix.check()
            kept = self.prefix.blocks()
        check_cache(self.requests, self.holder.live(), kept, free_is_unreadable=self.holder.debug_nan)
