"""Draws docs/state.svg: where a request's tokens lie. Run it after a change: python docs/draw_state.py"""

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 760
POSITION = 300  # the newest token of the request that is drawn
INK, SOFT, LINE, PAPER, EMPTY = "#1f2328", "#59636e", "#8c959f", "#f6f8fa", "#ffffff"
RING, CSA, HCA, TAIL, TABLE = "#9ec5fe", "#f5c27a", "#d7aefb", "#a3d9b1", "#e2e6ea"


class Drawing:
    """SVG elements, one after the other."""

    def __init__(self):
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str = LINE, radius: float = 2) -> None:
        """A rectangle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        colour: str = INK,
        anchor: str = "start",
        mono: bool = False,
    ) -> None:
        """A line of text."""
        family = ' font-family="ui-monospace, DejaVu Sans Mono, monospace"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{family}>'
            f"{escape(words)}</text>"
        )

    def title(self, x: float, y: float, words: str) -> None:
        """A heading."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="15" font-weight="600" fill="{INK}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="system-ui, Segoe UI, DejaVu Sans, sans-serif" role="img" '
            'aria-label="Where the tokens of a request lie in the cache">\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{SOFT}"/></marker></defs>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def draw() -> str:
    """The picture."""
    d = Drawing()
    d.box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, PAPER, LINE, 10)

    # The tokens of one request.
    left, scale = 40, 3.0
    d.title(left, 34, f"One request in slot s, after its token at position p = {POSITION}")
    y = 62
    d.box(left, y, (POSITION + 1) * scale, 16, EMPTY)
    for position in (0, 128, 256):
        d.text(left + position * scale, y - 5, str(position), 11, SOFT, "start")
    d.text(left + POSITION * scale, y - 5, str(POSITION), 11, SOFT, "middle")
    d.box(left + (POSITION - 127) * scale, y, 128 * scale, 16, RING)
    d.text(left + (POSITION - 63) * scale, y + 12, "window: 173 … 300", 11, INK, "middle")
    d.text(left + 86 * scale, y + 12, "tokens that only compressed entries remember", 11, SOFT, "middle")
    y += 26
    for entry in range((POSITION + 1) // 4):
        d.box(left + 4 * entry * scale, y, 4 * scale, 14, CSA)
    d.text(left, y + 28, "CSA: 75 entries of 4 tokens", 12, SOFT)
    y += 38
    for entry in range((POSITION + 1) // 128):
        d.box(left + 128 * entry * scale, y, 128 * scale, 14, HCA)
    d.box(left + 256 * scale, y, (POSITION - 255) * scale, 14, TAIL)
    d.text(left, y + 28, "HCA: 2 entries of 128 tokens", 12, SOFT)
    d.text(left + 256 * scale, y + 28, "45 tokens wait", 12, SOFT)

    # What the request holds at a fixed size.
    top = 196
    d.title(left, top, "State: one row per slot, of fixed size")
    d.text(left, top + 19, "arrays (layers of the kind, slots, rows, …)", 12, SOFT, mono=True)
    y, cell = top + 52, 3.0
    d.text(left, y - 8, "window ring, every layer: row = p mod 128", 13)
    d.box(left, y, 128 * cell, 22, RING)
    newest = POSITION % 128
    d.box(left + newest * cell, y - 2, 4, 26, INK, INK, 0)
    d.text(left + newest * cell + 9, y + 15, "300 in row 44, beside it 173: the oldest", 11)
    d.text(left, y + 38, "0", 11, SOFT)
    d.text(left + 128 * cell, y + 38, "127", 11, SOFT, "end")

    y += 70
    d.text(left, y - 8, "CSA tails, and the indexer's: row = p mod 8 (lane a), p mod 4 (b)", 13)
    for x, rows, first in ((left, 8, POSITION - POSITION % 4 - 4), (left + 228, 4, POSITION - POSITION % 4)):
        for row in range(rows):
            held = max(p for p in range(POSITION + 1) if p % rows == row)
            waits = held >= first  # an older one is in an entry, and its row free
            d.box(x + row * 26, y, 26, 22, TAIL if waits else EMPTY)
            d.text(x + row * 26 + 13, y + 15, str(held), 10, INK if waits else SOFT, "middle")
    d.text(left, y + 38, "lane a reaches into the window before: entries overlap", 11, SOFT)

    y += 78
    d.text(left, y - 8, "HCA tail: row = p mod 128", 13)
    d.box(left, y, 128 * cell, 22, EMPTY)
    first, last = 256 % 128, POSITION % 128
    d.box(left + first * cell, y, (last - first + 1) * cell, 22, TAIL)
    d.text(left + (last + 3) * cell, y + 15, "256 … 300 in rows 0 … 44", 11)
    d.text(left, y + 38, "the other rows are out of date, and nobody looks at them", 11, SOFT)

    # The paged part.
    right = 520
    d.title(right, top, "Paged: blocks of 128 tokens, from pools")
    d.text(right, top + 19, "arrays (layers of the kind, blocks, entries, …)", 12, SOFT, mono=True)
    y = top + 52
    d.text(right, y - 8, "block table of CSA, shared by its layers: (s, entry // 32)", 13)
    for column, block in enumerate((5, 2, 7, -1)):
        d.box(right + column * 44, y, 44, 22, TABLE)
        d.text(right + column * 44 + 22, y + 15, str(block), 12, INK, "middle", mono=True)
    y += 62
    d.text(right, y + 74, "CSA pool: 32 entries and 32 indexer keys a block", 13)
    for block in range(9):
        x = right + block * 48
        used = {5: 32, 2: 32, 7: 11}.get(block, 0)
        d.box(x, y, 44, 40, EMPTY)
        for entry in range(used):
            d.box(x + 1 + entry % 8 * 5.3, y + 1 + entry // 8 * 9.6, 5, 9, CSA, CSA, 0)
        d.text(x + 22, y + 54, str(block), 11, SOFT, "middle", mono=True)
    for column, block in enumerate((5, 2, 7)):
        d.arrow((right + column * 44 + 22, y - 40), (right + block * 48 + 22, y - 2))
    y += 116
    d.text(right, y - 8, "block table of HCA: (s, entry)", 13)
    for column, block in enumerate((3, 6, -1)):
        d.box(right + column * 44, y, 44, 22, TABLE)
        d.text(right + column * 44 + 22, y + 15, str(block), 12, INK, "middle", mono=True)
    y += 62
    d.text(right, y + 48, "HCA pool: 1 entry a block", 13)
    for block in range(9):
        x = right + block * 48
        d.box(x, y, 44, 14, HCA if block in (3, 6) else EMPTY)
        d.text(x + 22, y + 28, str(block), 11, SOFT, "middle", mono=True)
    for column, block in enumerate((3, 6)):
        d.arrow((right + column * 44 + 22, y - 40), (right + block * 48 + 22, y - 2))

    # A record.
    y = 582
    d.title(left, y, "A record, in the ring or in a block, format fp8: 580 bytes (its three parts lie in three arrays)")
    y += 14
    d.box(left, y, 540, 26, RING)
    d.text(left + 270, y + 17, "448 × E4M3, no position in them", 12, INK, "middle")
    d.box(left + 540, y, 154, 26, CSA)
    d.text(left + 617, y + 17, "64 × bfloat16, rotated", 12, INK, "middle")
    d.box(left + 694, y, 60, 26, TABLE)
    d.text(left + 724, y + 17, "scale", 12, INK, "middle")
    d.text(left + 764, y + 17, "one float32", 12, SOFT)
    y += 50
    d.title(left, y, "An indexer key, format nvfp4: 72 bytes")
    y += 14
    d.box(left, y, 128, 26, CSA)
    d.text(left + 64, y + 17, "128 × E2M1", 12, INK, "middle")
    d.box(left + 128, y, 40, 26, TABLE)
    d.text(left + 176, y + 17, "8 scales (E4M3), one for 16 values", 12, SOFT)
    y += 62
    d.text(
        left,
        y,
        "A reader masks by position, never by what a row holds: a token at p sees positions p - 127 … p and entries",
        12,
    )
    d.text(
        left,
        y + 17,
        "0 … (p + 1) // ratio - 1. So a slot is taken over without clearing it, and a position may be written again.",
        12,
    )
    return d.svg()


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("state.svg").write_text(draw())
