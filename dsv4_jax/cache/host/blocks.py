"""Which request owns which blocks."""

from collections.abc import Iterable, Set

import numpy as np

from ..allocator import BlockAllocator
from .in_flight import Released
from .undo import Undo


class BlockLedger:
    """The blocks of every slot by kind ("csa", "hca"), in the order of their entries.

    Every call succeeds as a whole or changes nothing.
    """

    def __init__(self, num_blocks: dict[str, int], undo: Undo):
        """num_blocks: physical blocks by kind. undo: takes note of every change."""
        self._undo = undo
        self._allocators = {kind: BlockAllocator(n, undo) for kind, n in num_blocks.items()}
        self._blocks: dict[int, dict[str, list[int]]] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers that have blocks."""
        return tuple(self._allocators)

    @property
    def slots(self) -> list[int]:
        """Slots with a request, ascending."""
        return sorted(self._blocks)

    @property
    def running(self) -> Set[int]:
        """Slots with a request, in no order."""
        return self._blocks.keys()

    def count(self, slot: int, kind: str) -> int:
        """Blocks of a kind that a slot has."""
        return len(self._blocks[slot][kind])

    def __contains__(self, slot: int) -> bool:
        return slot in self._blocks

    def num_total(self, kind: str) -> int:
        """Blocks of a kind."""
        return self._allocators[kind].num_total_blocks

    def num_free(self, kind: str) -> int:
        """Blocks of a kind that can be given out."""
        return self._allocators[kind].num_free

    def num_held(self, kind: str) -> int:
        """Blocks of a kind that nobody owns and that cannot be given out yet."""
        return self._allocators[kind].num_held

    def num_reclaimable(self, kind: str) -> int:
        """Blocks of a kind that are only cached for later prompts, and are given out when others run short."""
        return int(self._allocators[kind].kept_only.sum())

    def kept_only(self) -> dict[str, np.ndarray]:
        """By kind (blocks,) bool: the blocks that no request owns and that are kept."""
        return {kind: allocator.kept_only for kind, allocator in self._allocators.items()}

    def keep(self, blocks: dict[str, list[int]]) -> None:
        """Blocks of requests, by kind, stay when the requests end."""
        for kind, ids in blocks.items():
            self._allocators[kind].keep(ids)

    def any_kept(self, slot: int, first: int, end: int) -> bool:
        """Whether a block in columns [first, end) of a request is kept."""
        return any(self._allocators[kind].any_kept(ids[first:end]) for kind, ids in self._blocks[slot].items())

    def any_shared(self, slot: int, kind: str, first: int, end: int) -> bool:
        """Whether somebody besides a request owns a block in its columns [first, end)."""
        allocator = self._allocators[kind]
        return any(allocator.owners(block) > 1 for block in self._blocks[slot][kind][first:end])

    def evict(self, blocks: dict[str, list[int]]) -> Released:
        """Cached blocks, by kind, are evicted; those without an owner are held until `free`."""
        gone = {kind: self._allocators[kind].drop(ids) for kind, ids in blocks.items()}
        return Released({kind: [] for kind in gone}, gone)

    def adopt(self, slot: int, blocks: dict[str, list[int]]) -> None:
        """Opens a request whose first blocks are these, owned by others too."""
        for kind, ids in blocks.items():
            self._allocators[kind].share(ids)
        self._undo.item(self._blocks, slot)
        self._blocks[slot] = {kind: list(blocks[kind]) for kind in self._allocators}

    def free_blocks(self, kind: str) -> list[int]:
        """The blocks of a kind that can be given out."""
        return self._allocators[kind].free_ids

    def blocks(self, slot: int) -> dict[str, list[int]]:
        """Blocks of a slot by kind (a copy)."""
        return {kind: list(ids) for kind, ids in self._blocks[slot].items()}

    def open(self, slot: int) -> None:
        """A request without blocks."""
        self._undo.item(self._blocks, slot)
        self._blocks[slot] = {kind: [] for kind in self._allocators}

    def release(self, slot: int) -> Released:
        """Releases a request's share of all its blocks; those without an owner are held until `free`."""
        released = self.truncate(slot, dict.fromkeys(self.kinds, 0))
        self._undo.item(self._blocks, slot)
        del self._blocks[slot]
        released.slots.append(slot)
        return released

    def free(self, blocks: dict[str, list[int]]) -> None:
        """Held blocks, by kind, can be given out now."""
        for kind, ids in blocks.items():
            self._allocators[kind].unhold(ids)

    def short(self, need: dict[str, dict[int, int]]) -> dict[str, int]:
        """By kind how many blocks are missing for `extend` to give out need[kind][slot]; kinds that lack none are left
        out."""
        asked = {kind: sum(by_slot.values()) - self.num_free(kind) for kind, by_slot in need.items()}
        return {kind: n for kind, n in asked.items() if n > 0}

    def extend(self, need: dict[str, dict[int, int]]) -> dict[str, list[tuple[int, int, int]]]:
        """New blocks, need[kind][slot] of them -> by kind rows (slot, column, block). RuntimeError (OOM) if too few."""
        for kind, by_slot in need.items():
            asked, free, held = sum(by_slot.values()), self.num_free(kind), self.num_held(kind)
            if asked > free:
                wait = f" and {held} wait until planned steps are dispatched" if held else ""
                raise RuntimeError(out_of_blocks(kind, asked, free, wait))
        rows: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in need}
        for kind, by_slot in need.items():
            for slot, n in by_slot.items():
                owned = self._blocks[slot][kind]
                new = self._allocators[kind].acquire(n).tolist()
                rows[kind] += [(slot, column, block) for column, block in enumerate(new, len(owned))]
                self._undo.elements(owned, slice(len(owned), None))
                owned += new
        return rows

    def truncate(self, slot: int, keep: dict[str, int]) -> Released:
        """Releases the blocks after the first keep[kind]; those without an owner are held until `free`."""
        cells: dict[str, list[tuple[int, int]]] = {}
        blocks: dict[str, list[int]] = {}
        for kind, n in keep.items():
            owned = self._blocks[slot][kind]
            cells[kind] = [(slot, column) for column in range(n, len(owned))]
            blocks[kind] = self._allocators[kind].release(owned[n:], hold=True)
            self._undo.elements(owned, slice(n, None))
            del owned[n:]
        return Released(cells, blocks)

    def entered(self, cells: dict[str, list[tuple[int, int]]]) -> dict[str, list[tuple[int, int, int]]]:
        """What the tables hold at (slot, column), by kind: rows (slot, column, block), block -1 where none is owned."""
        rows: dict[str, list[tuple[int, int, int]]] = {}
        for kind, places in cells.items():
            rows[kind] = []
            for slot, column in places:
                owned = self._blocks[slot][kind] if slot in self._blocks else []
                rows[kind].append((slot, column, owned[column] if column < len(owned) else -1))
        return rows

    def all_entered(self, slot: int) -> dict[str, list[tuple[int, int, int]]]:
        """Rows (slot, column, block) of all blocks of a slot, by kind."""
        return {
            kind: [(int(slot), column, block) for column, block in enumerate(ids)]
            for kind, ids in self._blocks[slot].items()
        }

    def fork(self, source: int, target: int, shared: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
        """Opens `target` with the first shared[kind] blocks of `source` and new ones in place of the rest.

        Returns by kind the pairs (block of source, block of target) whose content is to be copied. RuntimeError (OOM)
        when the new blocks do not suffice; then nothing changed.
        """
        owned = self._blocks[source]
        self.open(target)
        try:
            # The rows' columns are as yet without the shared blocks; only the ids matter here.
            new = self.extend({kind: {target: len(ids) - shared[kind]} for kind, ids in owned.items()})
        except RuntimeError:
            self._undo.item(self._blocks, target)
            del self._blocks[target]
            raise
        for kind, ids in owned.items():
            common = ids[: shared[kind]]
            self._allocators[kind].share(common)
            self._undo.item(self._blocks[target], kind)
            self._blocks[target][kind] = common + [block for _, _, block in new[kind]]
        return {
            kind: list(zip(ids[shared[kind] :], self._blocks[target][kind][shared[kind] :], strict=True))
            for kind, ids in owned.items()
        }

    def check(self, kept: dict[str, list[int]]) -> None:
        """AssertionError unless every block is free or owned by exactly the slots that list it, and by who keeps it."""
        for kind, allocator in self._allocators.items():
            counts = np.zeros(allocator.num_total_blocks, np.int64)
            for slot, by_kind in self._blocks.items():
                ids = by_kind[kind]
                assert len(set(ids)) == len(ids), f"slot {slot} lists a {kind.upper()} block twice: {ids}"
                counts[ids] += 1
            counts[list(kept.get(kind, ()))] += 1
            owners = [allocator.owners(i) for i in range(allocator.num_total_blocks)]
            assert counts.tolist() == owners, (
                f"{kind.upper()} blocks have owners {owners}, listed are {counts.tolist()}"
            )
            free, held = allocator.free_ids, allocator.num_held
            assert len(free) + held == int((counts == 0).sum()), f"{kind.upper()}: {len(free)} free and {held} held"
            assert not counts[free].any(), f"{kind.upper()}: blocks are owned and free: {free}"
            assert len(set(free)) == len(free), f"{kind.upper()}: a block is free twice: {free}"


def out_of_blocks(kind: str, asked: int, free: int, wait: str = "") -> str:
    """The message of an error."""
    return (
        f"OOM: {asked} more {kind.upper()} blocks are needed, {free} are free{wait}: release requests or make "
        f"num_blocks_per_{kind}_layer larger"
    )


def rows_array(rows: Iterable[tuple[int, ...]], size: int, width: int) -> np.ndarray:
    """rows padded with -1 to (at least size, width) int32, so that calls of one shape compile once."""
    rows = list(rows)
    array = np.full((max(size, len(rows)), width), -1, np.int32)
    if rows:
        array[: len(rows)] = rows
    return array
