"""Steps that were planned, what became of them, and what they keep from being given to others.

A step in flight needs no care: every step takes the cache that the step before it returned, and XLA runs what data ties
together in that order, so whatever is dispatched later writes later. But between `plan_step` and the dispatch nothing
orders the step after what the host does meanwhile (a restored request is written at once, a freed block filled with
NaN). So what is released in between is given out again only once the plan can no longer be dispatched: the cache that
came back says that its step ran, it was taken back, or no array with its number exists.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .undo import Undo

MEMORY = 256
"""Of how many plans it is remembered that they ran, or were taken back: more than the cache knows of."""


@dataclass
class Released:
    """What a request released at once: it waits for the plans that were outstanding then."""

    cells: dict[str, list[tuple[int, int]]]  # (slot, column) of the block tables, by kind
    blocks: dict[str, list[int]]  # blocks without an owner, by kind
    slots: list[int] = field(default_factory=list)
    after: int = 0  # how many plans had been made by then


class Part(NamedTuple):
    """The tokens of one request in a step, and what the books said of it before."""

    generation: int  # which of the slot's requests
    start: int
    end: int
    pinned: int


@dataclass(eq=False)
class PlannedStep:
    """A plan whose fate is not known, or was lately."""

    number: int
    index: int  # plans that had been made before it
    parts: dict[int, Part]  # by slot
    given: dict[str, dict[int, int]]  # by kind and slot, the first column of the blocks given out for it
    caches: int  # caches that had come back before it was made

    def on_top(self, other: "PlannedStep") -> bool:
        """Whether this step continues from tokens of the other one."""
        return any(
            slot in other.parts
            and part.generation == other.parts[slot].generation
            and other.parts[slot].start < part.start <= other.parts[slot].end
            for slot, part in self.parts.items()
        )

    def meets(self, other: "PlannedStep") -> list[int]:
        """Slots of requests that both bring tokens of."""
        return [
            s for s, part in self.parts.items() if s in other.parts and part.generation == other.parts[s].generation
        ]


class PendingSteps:
    """The plans whose fate is not known, oldest first.

    Attributes:
      gone: numbers of which no array exists, as far as `observe` was told: their steps can no longer be dispatched.
    """

    def __init__(self, undo: Undo) -> None:
        """undo: takes note of every change."""
        self._undo = undo
        self.gone: frozenset[int] = frozenset()
        self._known: list[int] = []  # plans whose fate is known, not forgotten yet
        self._steps: dict[int, PlannedStep] = {}  # by number
        self._ran: dict[int, PlannedStep] = {}  # the newest that did, the last one last
        self._taken_back: dict[int, PlannedStep] = {}
        self._runs = np.int32(0)  # of the cache, when it was last looked at
        self.count = 0  # plans made
        self.caches = 0  # caches that came back
        self.looked_at = 0  # of them, when one was last looked at
        self.faults: list[str] = []  # what steps did that they should not have

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, number: int, parts: dict[int, Part], given: dict[str, dict[int, int]]) -> None:
        """A plan was made."""
        self._undo.item(self._steps, number)
        self._undo.attributes(self, "count")
        self._steps[number] = PlannedStep(number, self.count, parts, given, self.caches)
        self.count += 1

    @property
    def numbers(self) -> list[int]:
        """Of the plans, oldest first."""
        return list(self._steps)

    @property
    def known(self) -> list[int]:
        """Numbers of plans whose fate is known since `forget_known`."""
        return [number for number in self._known if number not in self._steps]

    def forget_known(self) -> None:
        """`known` begins anew."""
        self._known = []

    def observe(self, gone: Iterable[int]) -> None:
        """Of all plans, no array with one of these numbers exists."""
        self.gone = frozenset(gone)

    def find(self, number: int) -> PlannedStep | None:
        """The plan of this number, if its fate is not known."""
        return self._steps.get(number)

    def has_run(self, number: int) -> bool:
        """Whether the step is known to have run."""
        return number in self._ran

    def oldest(self) -> int:
        """The index of the oldest plan that may still be dispatched; when there is none, how many were made."""
        return next((s.index for s in self._steps.values() if s.number not in self.gone), self.count)

    def involves(self, slot: int) -> bool:
        """Whether a plan whose fate is not known has tokens of a request of this slot."""
        return any(slot in s.parts for s in self._steps.values())

    def is_doubtful(self, slot: int, generation: int) -> bool:
        """Whether the last plan of this request is gone, and was dispatched or dropped."""
        for step in reversed(self._steps.values()):
            if slot in step.parts and step.parts[slot].generation == generation:
                return step.number in self.gone
        return False

    def probably_ran(self) -> bool:
        """Whether as many caches came back as plans are gone since the first of them was made."""
        gone = [s for s in self._steps.values() if s.number in self.gone]
        return not gone or self.caches - gone[0].caches >= len(gone)

    def later(self, step: PlannedStep) -> list[PlannedStep]:
        """The plans made after this one that brought tokens of the same requests and were not taken back."""
        known = (*self._steps.values(), *self._ran.values())
        return [other for other in known if other.index > step.index and other.meets(step)]

    def looked(self, ran: np.ndarray) -> None:
        """The cache says which steps ran.

        ran: (1 + n,) int32, how many ran so far, then the numbers of the newest n, that of step i at i mod n.
        """
        new, size = (int(ran[0]) - int(self._runs)) % (1 << 32), len(ran) - 1
        faults, steps, done = list(self.faults), dict(self._steps), dict(self._ran)
        if new >> 31:
            faults.append("the cache that came back is older than the one before")
            new = 0
        numbers = [int(ran[1 + (int(ran[0]) - i) % size]) for i in range(min(new, size), 0, -1)]
        if new > size:  # too many to know each: what can no longer come has run, for all that is known
            numbers = [n for n in steps if n not in numbers and n in self.gone] + numbers
        for number in numbers:
            if (step := self._taken_back.get(number)) is not None:
                faults.append(_fault(step.parts, "was taken back, and its step ran"))
            if (step := steps.get(number) or done.get(number)) is None:
                continue
            for other in steps.values():
                if other.index < step.index and step.on_top(other):
                    faults.append(_fault(step.meets(other), "ran before the step whose tokens it goes on from"))
            for other in done.values():
                if other.index > step.index and other.meets(step):
                    faults.append(_fault(step.meets(other), "ran after a step that was planned later"))
            done.pop(number, None)
            done[number] = steps.pop(number, step)
        known = [*self._known, *(n for n in self._steps if n not in steps)]
        done = dict([*done.items()][-MEMORY:])
        self._undo.attributes(self, "faults", "_steps", "_ran", "_known", "_runs", "looked_at")
        vars(self).update(  # at once
            faults=faults, _steps=steps, _ran=done, _known=known, _runs=ran[0], looked_at=self.caches,
        )  # fmt: skip

    def lost(self) -> list[PlannedStep]:
        """The plans that no array holds, the newest first."""
        return [s for s in reversed(self._steps.values()) if s.number in self.gone]

    def take_back(self, step: PlannedStep) -> None:
        """The step will not run."""
        self._undo.attributes(self, "_taken_back", "_steps", "_known")
        taken_back = [*self._taken_back.items(), (step.number, step)][-MEMORY:]
        steps = {number: other for number, other in self._steps.items() if other is not step}
        vars(self).update(_taken_back=dict(taken_back), _steps=steps, _known=[*self._known, step.number])


def _fault(slots: Iterable[int], what: str) -> str:
    return f"a plan with tokens of slots {sorted(map(int, slots))} {what}"
