"""Host-side free list of physical blocks, with reference counts."""

from collections.abc import Sequence

import numpy as np

from .counts import count
from .host.undo import NO_UNDO, Undo


class BlockAllocator:
    """Gives out block ids 0 … num_total_blocks - 1; a block is free when its last owner has released it.

    A block that a step not yet dispatched may still read is held on release: nobody's, but not free before `unhold`.
    Every call succeeds as a whole or changes nothing.
    """

    def __init__(self, num_total_blocks: int, undo: Undo = NO_UNDO):
        """Raises ValueError for a negative number. undo: takes note of every change."""
        self.num_total_blocks, self._undo = count("num_total_blocks", num_total_blocks), undo
        self._free, self._given = list(range(self.num_total_blocks)), 0  # how many of the list are given out
        self._held: set[int] = set()
        self._kept = np.zeros(self.num_total_blocks, bool)
        self._owners = np.zeros(self.num_total_blocks, np.int32)

    @property
    def num_free(self) -> int:
        """Blocks that `acquire` can give out: nobody owns them, and they are not held."""
        return len(self._free) - self._given

    @property
    def num_held(self) -> int:
        """Blocks nobody owns that are not free yet."""
        return len(self._held)

    @property
    def free_ids(self) -> list[int]:
        """The free blocks, the next to be given out first."""
        return self._free[self._given :]

    def acquire(self, n: int) -> np.ndarray:
        """n distinct ids, int32 (n,). Raises RuntimeError (OOM) when fewer are free, ValueError when n is negative."""
        n = count("the number of blocks", n)
        if n > self.num_free:
            raise RuntimeError(
                f"OOM: asked for {n} blocks, {self.num_free} of {self.num_total_blocks} are free: release requests "
                "or make the pool larger"
            )
        if not n:
            return np.empty(0, np.int32)
        if 2 * self._given > len(self._free):  # the list does not grow for ever
            self._undo.attributes(self, "_free", "_given")
            vars(self).update(_free=self.free_ids, _given=0)
        ids = np.array(self._free[self._given : self._given + n], np.int32)
        self._undo.attributes(self, "_given")
        self._undo.elements(self._owners, ids)
        self._given += n
        self._owners[ids] = 1
        return ids

    def share(self, ids: Sequence[int] | np.ndarray) -> None:
        """One more owner for each of ids (n,). ValueError for one that is unknown, free or named twice; then nothing
        changed."""
        ids = self._owned(ids, "shared")
        self._undo.elements(self._owners, ids)
        self._owners[ids] += 1

    def release(self, ids: Sequence[int] | np.ndarray, *, hold: bool = False) -> list[int]:
        """Takes ids (n,) back -> those without an owner; they are free, or held if `hold`.

        ValueError for one that is unknown, not owned or named twice; then nothing changed.
        """
        ids = self._owned(ids, "released")
        self._undo.elements(self._owners, ids)
        self._owners[ids] -= 1
        gone = [i for i in ids if not self._owners[i]]
        if hold:
            self._undo.note(self._held.difference_update, gone)
            self._held.update(gone)
        else:
            self._undo.elements(self._free, slice(len(self._free), None))
            self._free.extend(gone)
        return gone

    @property
    def kept_only(self) -> np.ndarray:
        """(num_total_blocks,) bool: blocks whose only owner is `keep`."""
        return self._kept & (self._owners == 1)

    def any_kept(self, ids: Sequence[int]) -> bool:
        """Whether one of ids is kept."""
        return bool(self._kept[list(ids)].any())

    def keep(self, ids: Sequence[int]) -> None:
        """One more owner for each of ids, none of them kept already: somebody who can do without when blocks run short.

        ValueError as `share`; then nothing changed.
        """
        self.share(ids)
        self._undo.elements(self._kept, list(ids))
        self._kept[list(ids)] = True

    def drop(self, ids: Sequence[int]) -> list[int]:
        """Takes back what `keep` gave; those without an owner are held, and returned."""
        gone = self.release(ids, hold=True)
        self._undo.elements(self._kept, list(ids))
        self._kept[list(ids)] = False
        return gone

    def unhold(self, ids: Sequence[int]) -> None:
        """Held blocks are free now."""
        self._undo.note(self._held.update, list(ids))
        self._undo.elements(self._free, slice(len(self._free), None))
        self._held.difference_update(ids)
        self._free.extend(ids)

    def owners(self, block: int) -> int:
        """How many owners a block has; 0 when it is free."""
        return int(self._owners[block])

    def _owned(self, ids: Sequence[int] | np.ndarray, what: str) -> list[int]:
        try:
            ids = np.asarray(ids)
        except ValueError:  # lists of different lengths
            raise ValueError(f"{what} {ids!r}: expected a list of integer block ids") from None
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"{what} {ids.tolist()!r}: expected a list of integer block ids")
        seen: set[int] = set()
        for i in ids.tolist():
            if not 0 <= i < self.num_total_blocks:
                raise ValueError(f"{what} block {i}: this pool has {self.num_total_blocks} blocks, counted from 0")
            if i in seen:
                raise ValueError(f"{what} block {i} twice in one call")
            if not self._owners[i]:
                raise ValueError(
                    f"{what} block {i} twice: it is free already"
                    if what == "released"
                    else f"{what} block {i}: nobody owns it"
                )
            seen.add(i)
        return ids.tolist()
