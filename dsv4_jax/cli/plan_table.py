"""The report of `dsv4-jax plan` as tables."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from .sizes import show_bytes


def show(report: dict[str, Any]) -> None:
    """Prints the report to stdout."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    layers = ", ".join(f"{kind['layers']} {kind['kind'].upper()}" for kind in report["kinds"])
    formats = f"{report['records']} records, {report['indexer']} indexer keys"
    rollback = f", rollback of {report['max_rollback']} tokens" * bool(report["max_rollback"])
    console.print(f"{report['config']}: {sum(k['layers'] for k in report['kinds'])} layers ({layers})", soft_wrap=True)
    tails = ", running sums in HCA tails" * (report["hca_tail"] == "running")
    console.print(f"{formats}{tails}{rollback}\n")
    console.print("What one request holds, and what its tokens add (all layers of a kind together)")
    console.print(_kinds(report))
    console.print(f"\n{_load(report)}")
    console.print(_total(report))
    if report["devices"] > 1:
        console.print(
            f"\n{report['devices']} devices; the numbers are those of each. Their caches have room for "
            f"{report['cache_tokens']:,} tokens in all.",
            soft_wrap=True,
        )
    console.print(f"\n{_verdict(report)}\n", style="bold")
    console.print("The formats side by side")
    console.print(_formats(report, _COSTS))
    console.print(f"\nThe cache of {_load(report)}, and the largest that fit")
    console.print(_formats(report, _LIMITS))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", style="dim" if i == 0 else "", header_style="dim")
    return table


def _kinds(report: dict[str, Any]) -> Table:
    table = _table("layers", "ring", "tails", "bytes per token", f"block of {report['block_tokens']} tokens")
    for kind in report["kinds"]:
        table.add_row(
            f"{kind['layers']} {kind['kind'].upper()}",
            show_bytes(kind["ring_bytes_per_request"]),
            show_bytes(kind["tail_bytes_per_request"]),
            f"{kind['bytes_per_token']:,.1f}",
            show_bytes(kind["bytes_per_block"]),
        )
    ring, tails, block = (
        sum(kind[name] for kind in report["kinds"])
        for name in ("ring_bytes_per_request", "tail_bytes_per_request", "bytes_per_block")
    )
    table.add_row("all", show_bytes(ring), show_bytes(tails), f"{report['bytes_per_token']:,.1f}", show_bytes(block))
    return table


def _total(report: dict[str, Any]) -> Table:
    table = _table("", "bytes", "")

    def row(name: str, count: int, note: str = "") -> None:
        table.add_row(name, f"{count:,}", show_bytes(count), note)

    table.add_column(justify="left")
    row("rings and tails", report["state_bytes"])
    for kind in report["kinds"]:
        if kind["bytes_per_block"]:
            row(f"{kind['kind'].upper()} blocks", kind["pool_bytes"], f"{kind['blocks']:,} in each layer")
    row("block tables", report["table_bytes"])
    row("cache", report["total_bytes"])
    reserved, weights = report["reserved_bytes"], report["weights"]
    note = f"{show_bytes(reserved)} more reserved" if reserved else "nothing reserved"
    if weights["given"] is not None:
        row("weights", weights["held_bytes"], f"{show_bytes(weights['stored_bytes'])} in files")
        note = f"beside the weights, {note}"
    row("memory for it", report["memory_bytes"], note)
    return table


def _requests(count: int) -> str:
    return f"{count:,} request{'s' * (count != 1)}"


def _load(report: dict[str, Any]) -> str:
    return f"{_requests(report['concurrency'])} of {report['context']:,} tokens"


def _verdict(report: dict[str, Any]) -> str:
    at_limit = report["largest_context"] == report["context_limit"]
    context = f"{report['largest_context']:,} tokens" + ", the model's limit" * at_limit
    lines = [
        f"Largest context of {_requests(report['concurrency'])}: {context}",
        f"Largest concurrency at {report['context']:,} tokens: {_requests(report['largest_concurrency'])}",
    ]
    weights = report["weights"]
    if weights["given"] is None:
        size = show_bytes(weights["held_bytes"])
        lines.append(f"Not counted: its weights as released, {size} (see --weights)")
    if report["fits"]:
        left = report["memory_bytes"] - report["total_bytes"]
        what = "The cache fits" if weights["given"] is None else "It fits, weights and cache"
        return "\n".join([f"{what}: {show_bytes(left)} are left.", *lines])
    if weights["given"] is not None and not weights["fit"]:
        device = report["device_bytes"] - report["reserved_bytes"]
        return (
            f"It does not fit: the weights take {show_bytes(weights['held_bytes'])} and one device has "
            f"{show_bytes(device)} for them;\nwith the cache {show_bytes(report['missing_bytes'])} are missing."
        )
    lines.insert(
        0, f"It does not fit: {show_bytes(report['missing_bytes'])} ({report['missing_bytes']:,}) are missing."
    )
    smaller = [f"{entry['records']} + {entry['indexer']}" for entry in report["formats"] if entry["fits"]]
    if smaller:
        lines.append(f"As asked for, these formats would fit: {', '.join(smaller)}")
    if not report["largest_context"] and not report["largest_concurrency"]:
        alone = report["largest_context_alone"]
        if alone:
            lines.append(f"One request alone can have {alone:,} tokens")
        else:
            smallest = report["smallest_bytes"]
            lines.append(f"Not even one token fits: its cache takes {show_bytes(smallest)} ({smallest:,})")
    return "\n".join(lines)


# Columns of the formats, in two tables: side by side they are wider than a terminal.
_COSTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "record": lambda entry: f"{entry['record_bytes']:,} B",
    "key": lambda entry: f"{entry['key_bytes']} B",
    "per request": lambda entry: show_bytes(entry["bytes_per_request"]),
    "per token": lambda entry: f"{entry['bytes_per_token']:,.1f} B",
}
_LIMITS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cache": lambda entry: show_bytes(entry["total_bytes"]),
    "fits": lambda entry: "yes" if entry["fits"] else "no",
    "context": lambda entry: f"{entry['largest_context']:,}",
    "concurrency": lambda entry: f"{entry['largest_concurrency']:,}",
}


def _formats(report: dict[str, Any], columns: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    """A row for every pair of formats; the one that was asked for is bold."""
    table = _table("records + keys", *columns)
    for entry in report["formats"]:
        chosen = (entry["records"], entry["indexer"]) == (report["records"], report["indexer"])
        cells = (cell(entry) for cell in columns.values())
        table.add_row(f"{entry['records']} + {entry['indexer']}", *cells, style="bold" if chosen else None)
    return table
