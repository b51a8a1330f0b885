"""What the cache holds at a moment, and whose it is: rows, waiting tokens and blocks, from the host's bookkeeping.

Position decides the place of everything, so lengths and block lists say all of it; the device is not read.
"""

from dataclasses import dataclass, replace

from .manager import KVCacheManager
from .schema import CacheSchema
from .sharded_manager import ShardedKVCacheManager


@dataclass(frozen=True)
class Rows:
    """Rows that are reused in a circle: row = position mod rows.

    Attributes:
      name: "ring", or the tail: "csa", "csa lane a", "hca", "hca sums".
      positions: per row the position of the token it holds for later, -1 for none.
    """

    name: str
    positions: tuple[int, ...]

    @property
    def held(self) -> tuple[int, int]:
        """First and last position held, (0, -1) when there is none; those between are held too."""
        held = [p for p in self.positions if p >= 0]
        return (min(held), max(held)) if held else (0, -1)


@dataclass(frozen=True)
class SlotState:
    """One request.

    Attributes:
      slot: its slot.
      length: tokens planned so far.
      ring: its window ring, the same in all layers.
      tails: tokens that wait to be compressed, by kind of layer; lane a of CSA keeps the window before too; a running
        tail the sums after each of its newest tokens.
      entries: kind of layer -> entries that are complete.
      blocks: kind of layer -> its blocks, in the order of their entries.
    """

    slot: int
    length: int
    ring: Rows
    tails: tuple[Rows, ...]
    entries: dict[str, int]
    blocks: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PoolState:
    """The blocks of one kind of layer; all layers of the kind use them alike.

    Attributes:
      kind: "csa" or "hca".
      owners: per block the slots that own it; two or more share it after a fork, none means free.
      filled: per block how many of its entries are complete.
      entries_per_block: how many it can hold.
    """

    kind: str
    owners: tuple[tuple[int, ...], ...]
    filled: tuple[int, ...]
    entries_per_block: int


@dataclass(frozen=True)
class Occupancy:
    """The whole cache: requests by slot, pools by kind."""

    slots: tuple[SlotState, ...]
    pools: tuple[PoolState, ...]


def occupancy(manager: KVCacheManager | ShardedKVCacheManager) -> Occupancy:
    """The state of the manager's cache after the steps planned so far.

    Of a manager over a mesh: that of this process's shards, their slots and blocks one shard after the other.
    """
    if isinstance(manager, ShardedKVCacheManager):
        return _side_by_side(manager)
    kinds = {schema.kind: schema for schema in manager.cache.schemas}
    any_layer = manager.cache.schemas[0]
    slots = []
    for slot in manager.active_slots:
        length = manager.length(slot)
        slots.append(
            SlotState(
                slot=int(slot),
                length=length,
                ring=_rows("ring", any_layer.ring_rows, max(length - any_layer.ring_rows, 0), length),
                tails=tuple(rows for schema in kinds.values() for rows in _tails(schema, length)),
                entries={kind: length // s.compress_ratio for kind, s in kinds.items() if s.compress_ratio},
                blocks={kind: tuple(ids) for kind, ids in manager.blocks(slot).items()},
            )
        )
    return Occupancy(tuple(slots), tuple(_pool(manager, kinds[kind], slots) for kind in manager.cache.paged))


def _side_by_side(manager: ShardedKVCacheManager) -> Occupancy:
    slots: list[SlotState] = []
    pools: dict[str, PoolState] = {}
    for i, shard in enumerate(manager.shards):
        part, first = occupancy(shard), i * manager.slots_per_shard
        before = {kind: len(pool.owners) for kind, pool in pools.items()}
        for s in part.slots:
            blocks = {kind: tuple(before.get(kind, 0) + b for b in ids) for kind, ids in s.blocks.items()}
            slots.append(replace(s, slot=first + s.slot, blocks=blocks))
        for pool in part.pools:
            owners = tuple(tuple(first + slot for slot in each) for each in pool.owners)
            old = pools.get(pool.kind, replace(pool, owners=(), filled=()))
            pools[pool.kind] = replace(pool, owners=old.owners + owners, filled=old.filled + pool.filled)
    return Occupancy(tuple(slots), tuple(pools.values()))


def _rows(name: str, rows: int, first: int, end: int) -> Rows:
    positions = [-1] * rows
    for position in range(first, end):
        positions[position % rows] = position
    return Rows(name, tuple(positions))


def _tails(schema: CacheSchema, length: int) -> list[Rows]:
    if not schema.tail_rows:
        return []
    window = length - length % schema.compress_ratio
    if schema.running_tail:
        rows = schema.running_tail_rows
        return [_rows(f"{schema.kind} sums", rows, max(window, length - rows), length)]
    tails = [_rows(schema.kind, schema.tail_rows, window, length)]
    if schema.overlap:
        before = max(window - schema.compress_ratio, 0)
        tails.append(_rows(f"{schema.kind} lane a", schema.overlap_tail_rows, before, length))
    return tails


def _pool(manager: KVCacheManager, schema: CacheSchema, slots: list[SlotState]) -> PoolState:
    count, size = manager.cache.paged[schema.kind].num_blocks, schema.entries_per_block
    owners: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for state in slots:
        for column, block in enumerate(state.blocks[schema.kind]):
            owners[block].append(state.slot)
            filled[block] = max(filled[block], min(max(state.entries[schema.kind] - column * size, 0), size))
    return PoolState(schema.kind, tuple(map(tuple, owners)), tuple(filled), size)
