"""The state of a cache as text."""

from collections.abc import Iterator

from ..cache.occupancy import Occupancy, PoolState, Rows, SlotState

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter(slot: int) -> str:
    """The letter of a slot in pictures of blocks."""
    return LETTERS[slot % len(LETTERS)]


def counted(number: int, noun: str, plural: str = "") -> str:
    """The number and what is counted: 1 token, 2 tokens."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def lines(state: Occupancy) -> Iterator[str]:
    """Lines that say what every request holds, and who owns which block."""
    for slot in state.slots:
        yield from _slot(slot)
    if not state.slots:
        yield "  no request"
    for pool in state.pools:
        yield from _pool(pool)


def _slot(slot: SlotState) -> Iterator[str]:
    yield f"  {letter(slot.slot)}  slot {slot.slot}, {counted(slot.length, 'token')}"
    rows = len(slot.ring.positions)
    yield f"     ring  {_held(slot.ring)}, the next goes to row {slot.length % rows}"
    for tail in slot.tails:
        yield f"     tail  {tail.name}: {_held(tail)}"
    for kind, blocks in slot.blocks.items():
        ids = ", ".join(map(str, blocks)) or "none"
        yield f"     {kind}   {counted(slot.entries[kind], 'entry', 'entries')}; blocks: {ids}"


def _held(rows: Rows) -> str:
    first, last = rows.held
    count = last - first + 1
    what = f"hold tokens {first} to {last}" if count > 1 else f"holds token {first}" if count else "in use"
    return f"{count} of {len(rows.positions)} rows {what}"


def _pool(pool: PoolState) -> Iterator[str]:
    """Blocks by number: the owner's letter, * where several share one, . where it is free."""
    signs = "".join("." if not o else letter(o[0]) if len(o) == 1 else "*" for o in pool.owners)
    yield f"  {pool.kind} blocks  {signs}  {signs.count('.')} of {len(signs)} free"
    for block, owners in enumerate(pool.owners):
        if len(owners) > 1:
            yield f"     block {block} is shared by {' and '.join(letter(slot) for slot in owners)}"
