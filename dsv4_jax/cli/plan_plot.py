"""The picture of `dsv4-jax plan`: memory against context."""

import pathlib
from typing import Any

from .sizes import show_bytes

COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73")  # told apart with any colour vision
DASHES = ("-", (0, (5, 3)), "-", "-", "-.")
GIB = 2**30


def draw(report: dict[str, Any], lines: dict[str, list[tuple[int, int]]], path: pathlib.Path) -> None:
    """Draws the formats as lines, the memory as a limit and what was planned as a point; writes `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, sizes) in enumerate(lines.items()):
        contexts, counts = zip(*sizes, strict=True)
        gib = [count / GIB for count in counts]
        axes.plot(contexts, gib, label=name, color=COLOURS[i % 5], linestyle=DASHES[i % 5], linewidth=2)
    memory = report["memory_bytes"] / GIB
    axes.axhline(memory, color="black", linestyle=":", linewidth=1.5)
    axes.annotate(
        f"memory for the cache, {show_bytes(report['memory_bytes'])}", (0, memory), (4, 4),
        xycoords=axes.get_yaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    axes.plot(report["context"], report["total_bytes"] / GIB, "o", color="black", markersize=7, label="as planned")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.0f}K")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens of context of every request (K = 1024)")
    axes.set_ylabel("GiB of cache")
    requests = report["concurrency"]
    # A path is no formula, whatever signs are in it.
    title = f"{report['config']}: cache of {requests:,} request{'s' * (requests != 1)}"
    axes.set_title(title, loc="left", parse_math=False)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
