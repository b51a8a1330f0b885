"""The blocks of a step, with the number of its plan: what the host gives a step to enter in the cache.

The number goes into the step with the blocks, and the cache carries it out (`KVCache.ran`). So which steps ran is read
from the cache that comes back, never guessed. Beside that the host knows which arrays that hold a number still exist,
copies included: a plan of which nothing is left can no longer run.
"""

import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from .serialisation import serialisable

Array = jax.Array

_MOST = (1 << 31) - 1  # numbers are int32, and begin again with 1 after this many plans
_counter = itertools.count()
_holders: dict[int, list[weakref.ref]] = {}  # by number, the arrays that hold it
_managers: dict[int, weakref.ref] = {}  # by number, who made the plan
_unread: list[weakref.ref] = []  # arrays whose numbers were not asked for yet


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["sizes"])
@dataclass(frozen=True, eq=False)
class NewBlocks(Mapping[str, Any]):
    """By kind (n, 3) int32 rows (slot, column, block) to be entered in the tables; one array, so one operand of a step.

    rows: (1 + all n, 3) int32: (-1, -1, number of the plan, 0 for none), then the rows of each kind. sizes: kind, n.
    """

    rows: Array | np.ndarray
    sizes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        # Every copy is made here too: device_put, tree.map and the like build it anew.
        rows: Any = self.rows
        if isinstance(rows, (np.ndarray, jax.Array)) and not isinstance(rows, jax.core.Tracer):
            if len(_unread) % 64 == 63:
                _unread[:] = [ref for ref in _unread if ref() is not None]
            _unread.append(weakref.ref(rows))

    @classmethod
    def of(cls, rows: Mapping[str, list[tuple[int, int, int]]], size: int) -> "NewBlocks":
        """Rows padded to `size` of each kind, under a new number."""
        number = next(_counter) % _MOST + 1
        sizes = tuple((kind, max(size, len(entries))) for kind, entries in rows.items())
        array = np.full((1 + sum(n for _, n in sizes), 3), -1, np.int32)
        array[0, 2], start = number, 1
        for (_, n), entries in zip(sizes, rows.values(), strict=True):
            if entries:
                array[start : start + len(entries)] = entries
            start += n
        _holders[number] = []
        return cls(array, sizes)

    @classmethod
    def none(cls, kinds: tuple[str, ...], size: int) -> "NewBlocks":
        """`size` rows of padding of each kind, of no plan."""
        return cls(np.full((1 + size * len(kinds), 3), [-1, -1, 0], np.int32), tuple((kind, size) for kind in kinds))

    @property
    def number(self) -> Any:
        """() int32: the plan's number, 0 for none."""
        return self.rows[..., 0, 2]

    def __getitem__(self, kind: str) -> Any:
        start = 1
        for name, n in self.sizes:
            if name == kind:
                return self.rows[start : start + n]
            start += n
        raise KeyError(kind)

    def __iter__(self) -> Iterator[str]:
        return (kind for kind, _ in self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return NewBlocks, (self.rows, self.sizes)


serialisable(NewBlocks, list, lambda stored: (tuple((kind, n) for kind, n in stored[0]),))


def numbers_of(rows: Any) -> list[int]:
    """The numbers in rows (..., 3): several where plans were stacked or laid end to end. Waits for the array."""
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:  # what this process's devices have of it
        rows = np.concatenate([np.asarray(piece.data) for piece in rows.addressable_shards])
    rows = np.asarray(rows).reshape(-1, 3)
    return rows[(rows[:, 0] == -1) & (rows[:, 1] == -1) & (rows[:, 2] > 0), 2].tolist()


def is_held(number: int) -> bool:
    """Whether an array with the plan's number exists, so that its step may still be dispatched."""
    while _unread:
        ref = _unread[-1]
        array = ref()
        if array is not None and not _is_deleted(array):
            for found in numbers_of(array):
                if found in _holders and all(other is not ref for other in _holders[found]):
                    _holders[found].append(ref)
        _unread[:] = [other for other in _unread if other is not ref]
    return any((array := ref()) is not None and not _is_deleted(array) for ref in _holders.get(number, ()))


def forget(number: int) -> None:
    """What became of the plan is known."""
    _holders.pop(number, None)


def made_by(plan: Any, manager: Any) -> None:
    """manager.cancel_step(number) takes the plan back."""
    _managers[int(plan.new_blocks.number)] = weakref.ref(manager)
    if len(_managers) > 2048:
        for number in [n for n in itertools.islice(_managers, 1024) if n not in _holders]:
            del _managers[number]


def cancel(new_blocks: Mapping[str, Any]) -> None:
    """See `StepPlan.cancel`."""
    for number in numbers_of(new_blocks.rows) if isinstance(new_blocks, NewBlocks) else ():
        manager = _managers.get(number, lambda: None)()
        if manager is not None:
            manager.cancel_step(number)


def _is_deleted(array: Any) -> bool:
    return isinstance(array, jax.Array) and array.is_deleted()
