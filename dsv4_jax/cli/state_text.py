"""The state of a cache as text."""

from collections.abc import Iterator

from ..cache.occupancy import Occupancy, PoolState, Rows, SlotState

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter(slot: int) -> str:
    """The letter of a slot in pictures of blocks."""
    return LETTERS[slot % len(LETTERS)]


def lines(state: Occupancy) -> Iterator[str]:
    """Lines that say what every request holds, and who owns which block."""
    for slot in state.slots:
        yield from _slot(slot)
    if not state.slots:
        yield "  no request"
    for pool in state.pools:
        yield from _pool(pool)


def _slot(slot: SlotState) -> Iterator[str]:
    yield f"  {letter(slot.slot)}  slot {slot.slot}, {slot.length} tokens"
    rows = len(slot.ring.positions)
    yield f"     ring  {_held(slot.ring)}, the next goes to row {slot.length % rows}"
    for tail in slot.tails:
        yield f"     tail  {tail.name}: {_held(tail)}"
    for kind, blocks in slot.blocks.items():
        ids = ", ".join(map(str, blocks)) or "none"
        yield f"     {kind}   {slot.entries[kind]} entries; blocks: {ids}"


def _held(rows: Rows) -> str:
    first, last = rows.held
    count = last - first + 1
    what = f"tokens {first} to {last}" if count > 1 else f"token {first}" if count else "nothing"
    return f"{count} of {len(rows.positions)} rows hold {what}" if count else f"0 of {len(rows.positions)} rows in use"


def _pool(pool: PoolState) -> Iterator[str]:
    """Blocks by number: the owner's letter, * where several share one, . where it is free."""
    signs = "".join("." if not o else letter(o[0]) if len(o) == 1 else "*" for o in pool.owners)
    yield f"  {pool.kind} blocks  {signs}  {signs.count('.')} of {len(signs)} free"
    for block, owners in enumerate(pool.owners):
        if len(owners) > 1:
            yield f"     block {block} is shared by {' and '.join(letter(slot) for slot in owners)}"
