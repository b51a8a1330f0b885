"""The running requests as the host knows them: their slots, lengths and blocks."""

import itertools

import numpy as np

from ..counts import is_integer
from ..schema import CacheSchema
from .blocks import BlockLedger
from .in_flight import Part, PendingSteps, PlannedStep, Released
from .slot import Slot
from .undo import Undo

_TABLES = itertools.count(1)


class RequestTable:
    """Which slots hold a request, how long it is and which blocks it owns.

    Every call that fails leaves it as it was. Released blocks and slots become free at the next `collect` after
    every plan made before the release was dispatched.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: dict[str, int],
        schema_of: dict[str, CacheSchema],
        *,
        max_context_len: int,
        max_rollback: int,
        block_size: int,
    ):
        """num_blocks, schema_of: physical blocks and geometry of the kinds of layers that have blocks.

        max_context_len: tokens of one request at most. block_size: tokens that a block covers.
        """
        self.num_slots, self.schema_of = num_slots, schema_of
        self.max_context_len, self.max_rollback, self.block_size = max_context_len, max_rollback, block_size
        self.undo = Undo()
        self.ledger = BlockLedger(num_blocks, self.undo)
        self.pending = PendingSteps(self.undo)
        self.plans_kept_blocks = False  # whether plans say which blocks a step does not write
        self.free_slots = list(range(num_slots))  # that freed longest ago first
        self._lengths: dict[int, int] = {}
        self._pinned: dict[int, int] = {}
        self._complete_from: dict[int, int] = {}
        self._generations = [-1] * num_slots
        self._number = next(_TABLES)  # a handle knows whose it is
        self._released: list[Released] = []

    def emptied(self) -> "RequestTable":
        """A table of the same sizes without requests; handles of this one's requests are errors there too."""
        sizes = {kind: self.ledger.num_total(kind) for kind in self.ledger.kinds}
        fresh = RequestTable(
            self.num_slots,
            sizes,
            self.schema_of,
            max_context_len=self.max_context_len,
            max_rollback=self.max_rollback,
            block_size=self.block_size,
        )
        fresh.plans_kept_blocks = self.plans_kept_blocks
        fresh._number = self._number
        used = [slot for slot in range(self.num_slots) if slot not in self.free_slots]
        fresh.free_slots = [*self.free_slots, *used]
        fresh._generations = [generation + 1 for generation in self._generations]
        return fresh

    # Requests.

    @property
    def slots(self) -> list[Slot]:
        """Slots with a request, ascending."""
        return [self.handle(slot) for slot in self.ledger.slots]

    def handle(self, slot: int) -> Slot:
        """The handle of the request that a slot holds."""
        return Slot(slot, self._generations[slot], self._number)

    def require(self, slot: int) -> None:
        """ValueError unless `slot` holds a request and, if it is a Slot, that very request."""
        if not is_integer(slot):
            raise ValueError(f"slot is {slot!r}: expected an integer, as admission returns it")
        if isinstance(slot, Slot) and slot.table not in (0, self._number):
            raise ValueError(f"slot {slot} is a handle of another manager: expected one that this manager gave out")
        if isinstance(slot, Slot) and 0 <= slot < self.num_slots and slot.generation != self._generations[slot]:
            raise ValueError(
                f"slot {slot} was released and has been given out again: this handle's request has ended, use the one "
                "that admission returned last"
            )
        if slot not in self.ledger:
            raise ValueError(f"slot {slot} holds no request: slots in use are {self.ledger.slots}")

    def require_written(self, slot: int) -> None:
        """ValueError unless `slot` holds a request and all its tokens are in the cache."""
        self.require(slot)
        if self.pending.involves(slot):
            raise ValueError(
                f"slot {slot} has a planned step that was not dispatched: assign the step's result to manager.cache "
                "first, or cancel the plan"
            )
        if self._lengths[slot] < self._complete_from[slot]:
            raise ValueError(
                f"slot {slot} has {self._lengths[slot]} tokens and goes on from a prefix hit: its ring and tails are "
                f"complete with token {self._complete_from[slot]}"
            )

    def open(self, length: int = 0, pinned: int = 0) -> Slot:
        """A request of `length` tokens with the blocks for them -> the slot that has been free longest.

        RuntimeError when all slots are taken or too few blocks are free; then nothing changed.
        """
        slot = self._take_slot()
        self.ledger.open(slot)
        try:
            self.ledger.extend({kind: {slot: n} for kind, n in self.blocks_for(length).items()})
        except RuntimeError:
            self.ledger.release(slot)
            self._give_slot(slot)
            raise
        return self._begin(slot, length, pinned)

    def adopt(self, blocks: dict[str, list[int]], length: int) -> Slot:
        """A request whose first blocks are these -> its slot; it has `length` tokens, and the blocks may hold more.

        Tokens that the blocks hold are fed again, and do not write entries. RuntimeError when all slots are taken.
        """
        slot = self._take_slot()
        self.ledger.adopt(slot, blocks)
        covered = max((len(ids) * self.block_size for ids in blocks.values()), default=length)
        self._begin(slot, length, covered)
        self.undo.item(self._complete_from, slot)
        self._complete_from[slot] = covered
        return self.handle(slot)

    def fork(self, slot: int, shared: dict[str, int]) -> tuple[Slot, dict[str, list[tuple[int, int]]]]:
        """A second request as long as `slot` -> its slot, and `BlockLedger.fork`'s copies. RuntimeError as there."""
        target = self._take_slot()
        try:
            copies = self.ledger.fork(slot, target, shared)
        except RuntimeError:
            self._give_slot(target)
            raise
        return self._begin(target, self._lengths[slot], self._pinned[slot]), copies

    def release(self, slot: int, after: int | None = None) -> None:
        """Ends a request; after: see `hold`."""
        self.hold(self.ledger.release(slot), after)
        for known in (self._lengths, self._pinned, self._complete_from):
            self.undo.item(known, slot)
            del known[slot]

    # Lengths.

    def length(self, slot: int) -> int:
        """Tokens of a request."""
        return self._lengths[slot]

    def pinned(self, slot: int) -> int:
        """Tokens of `slot` that no rollback can take back, so that nothing writes there again.

        Ring and tails have room for `max_rollback` tokens more than a step needs, counted from the newest token the
        request ever had: an older row may be overwritten, and going back does not bring it back.
        """
        return self._pinned[slot]

    def grow(self, slot: int, length: int) -> None:
        """A request has `length` tokens now."""
        self._set(slot, length, max(self._pinned[slot], length - self.max_rollback))

    def _set(self, slot: int, length: int, pinned: int) -> None:
        self.undo.item(self._lengths, slot)
        self.undo.item(self._pinned, slot)
        self._lengths[slot], self._pinned[slot] = length, pinned

    def pin_until(self, slot: int, length: int) -> None:
        """No rollback takes back the first `length` tokens of a request from now on: others may read their blocks."""
        self._set(slot, self._lengths[slot], max(self._pinned[slot], length))

    def kept_blocks(self) -> np.ndarray | None:
        """(slots,) int32: how many blocks of each request a step does not write, because what they hold is final.

        None where prefix hits never compute tokens again that blocks hold.
        """
        if not self.plans_kept_blocks:
            return None
        kept = np.zeros(self.num_slots, np.int32)
        for slot, length in self._complete_from.items():
            if self._lengths[slot] < length:
                kept[slot] = length // self.block_size
        return kept

    def truncate(self, slot: int, length: int) -> None:
        """A request is cut to `length` tokens; its blocks beyond are released.

        While a prefix hit is computed again, blocks beyond the length hold entries that are not written a second time.
        """
        self._set(slot, length, self._pinned[slot])
        self.hold(self.ledger.truncate(slot, self.blocks_for(max(length, self._complete_from[slot]))))

    def blocks_for(self, num_tokens: int) -> dict[str, int]:
        """Blocks that `num_tokens` tokens of one request need, by kind."""
        return {kind: schema.blocks_for(num_tokens) for kind, schema in self.schema_of.items()}

    def missing(self, kind: str, slot: int, num_tokens: int) -> int:
        """Blocks that `slot` lacks to hold `num_tokens` tokens (at most max_context_len)."""
        needed = self.schema_of[kind].blocks_for(min(num_tokens, self.max_context_len))
        return max(needed - self.ledger.count(slot, kind), 0)

    def all_missing(self, kind: str, ends: dict[int, int]) -> dict[int, int]:
        """`missing` of each slot that lacks blocks, for ends[slot] tokens."""
        blocks_for, count, most = self.schema_of[kind].blocks_for, self.ledger.count, self.max_context_len
        lacking = ((slot, blocks_for(min(end, most)) - count(slot, kind)) for slot, end in ends.items())
        return {slot: n for slot, n in lacking if n > 0}

    # Steps that were planned, and what waits for them.

    def planned(self, number: int, starts: dict[int, int], ends: dict[int, int], new: dict[str, list]) -> None:
        """A plan was made, of tokens at positions [start, end) by slot; new: rows of the blocks given out."""
        pinned = {slot: self._pinned[slot] for slot in ends}
        parts = {s: Part(self._generations[s], starts[s], end, pinned[s]) for s, end in ends.items()}
        given: dict[str, dict[int, int]] = {kind: {} for kind in new}
        for kind, rows in new.items():
            for slot, column, _ in rows:
                given[kind].setdefault(slot, column)
        self.pending.add(number, parts, given)
        # As `grow` for each, with one note.
        self.undo.note(self._lengths.update, {slot: self._lengths[slot] for slot in ends})
        self.undo.note(self._pinned.update, pinned)
        self._lengths.update(ends)
        self._pinned.update({slot: max(pinned[slot], end - self.max_rollback) for slot, end in ends.items()})

    def is_doubtful(self, slot: int) -> bool:
        """Whether the last plan of this request is gone, and it is not known whether its step ran."""
        return bool(self.pending) and self.pending.is_doubtful(slot, self._generations[slot])

    def take_back(self, step: PlannedStep) -> None:
        """A planned step will not run: its requests are as they were before it.

        ValueError where a later plan continues from its tokens. A request that was rolled back before it and planned
        anew stays as it is.
        """
        later = self.pending.later(step)
        if any(other.on_top(step) for other in later):
            raise ValueError(
                f"the plan brings tokens of slots {sorted(step.parts)} and a later plan goes on from them: cancel that "
                "one first"
            )
        elsewhere = {slot for other in later for slot in other.meets(step)}
        for slot, part in step.parts.items():
            if slot in elsewhere or slot not in self.ledger or self._generations[slot] != part.generation:
                continue
            self._set(slot, min(self._lengths[slot], part.start), part.pinned)
            owned = self.ledger.blocks(slot)
            keep = {kind: min(len(ids), step.given[kind].get(slot, len(ids))) for kind, ids in owned.items()}
            if any(keep[kind] < len(ids) for kind, ids in owned.items()):
                # No step has these blocks: not an older one, they were free, and not a later one.
                self.hold(self.ledger.truncate(slot, keep), after=0)
        self.pending.take_back(step)

    def looked(self, ran: np.ndarray) -> None:
        """The cache, which is here, says which steps ran (`PendingSteps.looked`); of the others those are taken back
        that no array holds."""
        self.pending.looked(ran)
        for step in self.pending.lost():
            try:
                self.take_back(step)
            except ValueError:  # somebody counts on its tokens, and will be told
                continue

    def hold(self, released: Released, after: int | None = None) -> None:
        """What was released becomes free when none of the first `after` plans can still be dispatched; None: of all."""
        released.after = self.pending.count if after is None else after
        self.undo.attributes(self, "_released")
        self._released = [*self._released, released]

    def collectable(self) -> list[Released]:
        """What no outstanding plan can still read; its places in the tables are to be entered, then it is free."""
        oldest = self.pending.oldest()
        return [released for released in self._released if released.after <= oldest]

    def free(self, released: Released) -> None:
        """Makes free what `collectable` named."""
        self.undo.attributes(self, "_released")
        self._released = [other for other in self._released if other is not released]
        self.ledger.free(released.blocks)
        for slot in released.slots:
            self._give_slot(slot)

    def entered_in_vain(self, cells: dict[str, list[tuple[int, int]]]) -> None:
        """The tables may hold something at these places (slot, column), by kind, that the books know nothing of."""
        self._released = [*self._released, Released({**{kind: [] for kind in self.ledger.kinds}, **cells}, {})]

    @property
    def waiting(self) -> list[Released]:
        """What was released and is not free yet."""
        return list(self._released)

    def check(self, kept: dict[str, list[int]]) -> None:
        """AssertionError unless slots, lengths and blocks fit together; kept: blocks by kind that `keep` got."""
        self.ledger.check(kept)
        assert not self.pending.faults, self.pending.faults[0]
        waiting = [slot for released in self._released for slot in released.slots]
        assert sorted([*self.free_slots, *waiting, *self.ledger.slots]) == list(range(self.num_slots)), "slots"
        assert set(self._lengths) == set(self._pinned) == set(self.ledger.slots), "lengths"
        for slot, length in self._lengths.items():
            assert 0 <= length <= self.max_context_len, f"slot {slot} has {length} tokens"
            for kind, needed in self.blocks_for(length).items():
                owned = len(self.ledger.blocks(slot)[kind])
                assert owned >= needed, f"slot {slot} has {owned} {kind.upper()} blocks and needs {needed}"
        for kind in self.ledger.kinds:
            held = sum(len(released.blocks.get(kind, ())) for released in self._released)
            assert held == self.ledger.num_held(kind), f"{kind.upper()}: {held} blocks wait"

    def _take_slot(self) -> int:
        if not self.free_slots:
            waiting = sum(len(released.slots) for released in self._released)
            wait = f" ({waiting} of them wait until planned steps are dispatched)" if waiting else ""
            raise RuntimeError(
                f"all {self.num_slots} concurrent requests are running{wait}: release one or make "
                "max_concurrent_requests larger"
            )
        self.undo.elements(self.free_slots, slice(None))
        # An old number in an array, which knows no handles, then means a slot without a request as long as can be.
        return self.free_slots.pop(0)

    def _give_slot(self, slot: int) -> None:
        self.undo.elements(self.free_slots, slice(None))
        self.free_slots.append(slot)

    def _begin(self, slot: int, length: int, pinned: int) -> Slot:
        self._set(slot, length, pinned)
        self.undo.item(self._complete_from, slot)
        self.undo.elements(self._generations, slot)
        self._complete_from[slot] = 0
        self._generations[slot] += 1
        return self.handle(slot)
