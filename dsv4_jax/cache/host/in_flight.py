"""Steps that were planned and not dispatched, and what they keep from being given to others.

A step in flight needs no care: every step takes the cache that the step before it returned, and XLA runs what data ties
together in that order, so whatever is dispatched later writes later. But between `plan_step` and the dispatch nothing
orders the step after what the host does meanwhile (a restored request is written at once, a freed block filled with
NaN). So what is released in between is given out again only once the plan cannot come any more: its step's result is in
`manager.cache`, or the plan object is gone.
"""

import weakref
from collections import deque
from dataclasses import dataclass, field

from ..plan import StepPlan


@dataclass
class Released:
    """What a request gave up at once: it waits for the plans that were outstanding then."""

    cells: dict[str, list[tuple[int, int]]]  # (slot, column) of the block tables, by kind
    blocks: dict[str, list[int]]  # blocks nobody owns any more, by kind
    slots: list[int] = field(default_factory=list)
    after: int = 0  # number of the newest plan outstanding at that time


class PendingSteps:
    """The outstanding plans, oldest first, numbered from 1."""

    def __init__(self) -> None:
        self._plans: deque[tuple[int, weakref.ref[StepPlan], frozenset[int]]] = deque()
        self._count = 0

    def add(self, plan: StepPlan, slots: frozenset[int]) -> None:
        """A plan was made that reads or writes `slots`."""
        self._count += 1
        self._plans.append((self._count, weakref.ref(plan), slots))

    def dispatched(self) -> None:
        """The oldest outstanding plan's step was dispatched and its result is the cache."""
        self._drop_dead()
        if self._plans:
            self._plans.popleft()

    def newest(self) -> int:
        """Number of the newest outstanding plan; 0 when there is none."""
        self._drop_dead()
        return self._plans[-1][0] if self._plans else 0

    def oldest(self) -> int:
        """Number of the oldest outstanding plan; when there is none, more than any plan's so far."""
        self._drop_dead()
        return self._plans[0][0] if self._plans else self._count + 1

    def involves(self, slot: int) -> bool:
        """Whether an outstanding plan brings tokens of `slot`."""
        self._drop_dead()
        return any(slot in slots for _, _, slots in self._plans)

    def _drop_dead(self) -> None:
        """A plan that no longer exists can no longer be dispatched."""
        self._plans = deque(p for p in self._plans if p[1]() is not None)
