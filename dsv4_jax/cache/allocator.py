"""Host-side free list of physical blocks."""

from collections import deque
from collections.abc import Iterable

import numpy as np


class BlockAllocator:
    """Gives out block ids 0 … num_total_blocks - 1, each to one owner at a time; every call succeeds whole or not at all."""

    def __init__(self, num_total_blocks: int):
        """Raises ValueError for a negative number."""
        if num_total_blocks < 0:
            raise ValueError(f"num_total_blocks is {num_total_blocks}: expected 0 or more")
        self.num_total_blocks = num_total_blocks
        self._free = deque(range(num_total_blocks))
        self._taken = np.zeros(num_total_blocks, bool)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def acquire(self, n: int) -> np.ndarray:
        """n distinct ids, int32 (n,). Raises RuntimeError (OOM) when fewer are free, ValueError when n is negative."""
        if n < 0:
            raise ValueError(f"asked for {n} blocks: expected 0 or more")
        if n > len(self._free):
            raise RuntimeError(
                f"OOM: asked for {n} blocks, {len(self._free)} of {self.num_total_blocks} are free: release requests "
                "or make the pool larger"
            )
        ids = np.array([self._free.popleft() for _ in range(n)], np.int32)
        self._taken[ids] = True
        return ids

    def release(self, ids: Iterable[int]) -> None:
        """Takes ids back. Raises ValueError for an id that is unknown, not owned or named twice, and changes nothing."""
        ids = [int(i) for i in np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).reshape(-1)]
        seen = set()
        for i in ids:
            if not 0 <= i < self.num_total_blocks:
                raise ValueError(f"released block {i}: this pool has blocks 0 to {self.num_total_blocks - 1}")
            if i in seen or not self._taken[i]:
                raise ValueError(f"released block {i} twice: it is free already")
            seen.add(i)
        self._taken[ids] = False
        self._free.extend(ids)
