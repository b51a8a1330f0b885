"""What makes a call of the manager change its books as a whole or not at all, whatever interrupts it."""

from collections.abc import Callable
from typing import Any


class Undo:
    """How to put back what a call under way has changed so far.

    Whoever changes something notes before how to restore it. What is noted sets old values, so that doing it twice, or
    where the change was never made, does no harm: an undoing that is interrupted is simply done again.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._active = False

    def begin(self) -> None:
        """A call begins; what an interrupted one left is undone first."""
        self.roll_back()
        self._active = True

    def note(self, restore: Callable[..., Any], *arguments: Any) -> None:
        """restore(*arguments) puts back what is changed next; outside a call nothing is noted."""
        if self._active:
            self._notes.append((restore, arguments))

    @property
    def changed(self) -> bool:
        """Whether the call under way has changed anything."""
        return bool(self._notes)

    def keep(self) -> None:
        """What was changed so far stays, whatever comes of the call."""
        self._notes = []

    def done(self) -> None:
        """All changes are made: they stay."""
        # Python hears Ctrl-C at the end of calls: without one, what the call returns can no longer be lost.
        self._notes, self._active = [], False

    def roll_back(self) -> None:
        """Undoes the changes of a call that was not done; may be interrupted and called again."""
        while self._notes:
            restore, arguments = self._notes[-1]
            restore(*arguments)
            del self._notes[-1]
        self._active = False

    # Notes on what is changed in place.

    def attributes(self, owner: Any, *names: str) -> None:
        """These attributes will be assigned."""
        self.note(vars(owner).update, {name: vars(owner)[name] for name in names})

    def item(self, mapping: dict, key: Any) -> None:
        """This item will be set or deleted."""
        if key in mapping:
            self.note(mapping.__setitem__, key, mapping[key])
        else:
            self.note(mapping.pop, key, None)

    def elements(self, values: Any, index: Any) -> None:
        """These elements of a list or a numpy array will be assigned, or a list's slice deleted or extended."""
        old = values[index]
        self.note(values.__setitem__, index, old.copy() if hasattr(old, "copy") else old)


class NoUndo(Undo):
    """For books of nobody's."""

    def note(self, restore: Callable[..., Any], *arguments: Any) -> None:
        """Nothing is noted."""


NO_UNDO = NoUndo()
