"""The state of a cache, step by step, as one SVG picture."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from ..cache.occupancy import Occupancy, PoolState, Rows
from .state_text import counted, letter

WIDTH, MARGIN, LABEL = 1000, 24, 132
NAME, STRIP, CELL = 96, 620, 22  # widths of a strip's name, of a strip of rows, and of a block
INK, SOFT, LINE, PAPER, EMPTY = "#1f2328", "#59636e", "#c4cad1", "#f6f8fa", "#ffffff"
COLOURS = ("#5b9bf3", "#f0a04b", "#a978e8", "#55b97a", "#e8707a", "#46b8c8", "#c9a227", "#8d99a6")
LEGEND = (
    "A strip is the rows of a ring or tail; beside it the positions it holds, and in it a dark line after the newest.",
    "A square is a block, as full as its entries are, with the letters of the requests that own it.",
)


def picture(steps: Sequence[tuple[str, Occupancy]]) -> str:
    """An SVG file of the named states, from top to bottom."""
    parts: list[str] = []
    y = 34.0
    parts.append(_text(MARGIN, y, "The cache, step by step", 16, INK, True))
    for i, line in enumerate(LEGEND):
        parts.append(_text(MARGIN, y + 18 + 15 * i, line, 11, SOFT))
    y += 29 + 15 * len(LEGEND)
    for name, state in steps:
        y = _step(parts, y, name, state)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" role="img" '
        'font-family="system-ui, Segoe UI, DejaVu Sans, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{y:g}" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _step(parts: list[str], y: float, name: str, state: Occupancy) -> float:
    parts.append(f'<line x1="{MARGIN}" y1="{y:g}" x2="{WIDTH - MARGIN}" y2="{y:g}" stroke="{LINE}"/>')
    y += 22
    parts.append(_text(MARGIN, y, name, 13, INK, True))
    y += 10
    for slot in state.slots:
        colour = COLOURS[slot.slot % len(COLOURS)]
        title = f"{letter(slot.slot)}  slot {slot.slot}, {counted(slot.length, 'token')}"
        parts.append(_text(MARGIN, y + 13, title, 11, INK))
        for name, rows in ((slot.ring.name, slot.ring), *((f"tail {tail.name}", tail) for tail in slot.tails)):
            _strip(parts, y + 4, name, rows, colour, slot.length - 1)
            y += 15
        y += 6
    for pool in state.pools:
        y = _pool(parts, y, pool)
    return y + 14


def _strip(parts: list[str], y: float, name: str, rows: Rows, colour: str, newest: int) -> None:
    """The rows of a ring or tail: a run of rows in use is one rectangle, and a dark line marks the newest token."""
    left, width = MARGIN + LABEL + NAME, STRIP / len(rows.positions)
    first, last = rows.held
    parts.append(_text(MARGIN + LABEL, y + 9, name, 10, SOFT))
    parts.append(_box(left, y, STRIP, 10, EMPTY, LINE))
    used = [p >= 0 for p in rows.positions]
    start = 0
    for end in range(1, len(used) + 1):
        if end == len(used) or used[end] != used[start]:
            if used[start]:
                parts.append(_box(left + start * width, y, (end - start) * width, 10, colour))
            start = end
    if newest in rows.positions:
        parts.append(_box(left + (rows.positions.index(newest) + 1) * width - 3, y - 1, 3, 12, INK))
    held = f"{first}–{last}" if last > first else f"{first}" if last == first else "empty"
    parts.append(_text(left + STRIP + 8, y + 9, held, 10, SOFT))


def _pool(parts: list[str], y: float, pool: PoolState) -> float:
    """A square for every block, striped where it is shared."""
    per_line = (WIDTH - 2 * MARGIN - LABEL) // (CELL + 4)
    free = sum(not owners for owners in pool.owners)
    parts.append(_text(MARGIN, y + 15, f"{pool.kind.upper()} blocks, {free} free", 11, INK))
    for block, owners in enumerate(pool.owners):
        x, top = MARGIN + LABEL + block % per_line * (CELL + 4), y + block // per_line * (CELL + 4)
        parts.append(_box(x, top, CELL, CELL, EMPTY, LINE))
        height = CELL * pool.filled[block] / pool.entries_per_block
        for i, slot in enumerate(owners):
            stripe = CELL / len(owners)
            colour = COLOURS[slot % len(COLOURS)]
            parts.append(_box(x + i * stripe, top, stripe, CELL, colour, opacity=0.25))
            parts.append(_box(x + i * stripe, top + CELL - height, stripe, height, colour))
        if owners:
            parts.append(_text(x + CELL / 2, top + 15, "".join(map(letter, owners)), 10, INK, anchor="middle"))
    return y + -(-len(pool.owners) // per_line) * (CELL + 4) + 4


def _box(x: float, y: float, w: float, h: float, fill: str, line: str = "none", opacity: float = 1) -> str:
    return f'<rect x="{x:.6g}" y="{y:.6g}" width="{w:.6g}" height="{h:.6g}" fill="{fill}" stroke="{line}"' + (
        f' fill-opacity="{opacity:g}"/>' if opacity < 1 else "/>"
    )


def _text(x: float, y: float, words: str, size: int, colour: str, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )
