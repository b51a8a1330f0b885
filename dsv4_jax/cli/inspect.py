"""`dsv4-jax inspect`: what a checkpoint is, and whether it loads."""

import dataclasses
import json
import pathlib
import sys
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .sizes import show_bytes
from .terminal import make_console, status

SHOWN = 5


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or a safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Says what a checkpoint holds: kind, layers, sizes, types, and what is missing or surplus.

    Only headers and config.json are read, no tensor. The exit status is 0 where `generate` could load it and 1 where
    something keeps it from that; draft layers are skipped and counted.

    Example: dsv4-jax inspect DeepSeek-V4-Flash
    """
    from dsv4_jax.model.inspection import inspect_checkpoint

    with status(make_console(quiet), f"reading the headers of {path}"):
        report = inspect_checkpoint(pathlib.Path(path))
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"parameters": report.parameters, "bytes": report.nbytes}))
    else:
        _show(report)
    return 1 if report.problems else 0


def _show(report: Any) -> None:
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)
    count = len(report.files)
    draft = "draft layers"
    console.print(f"{report.path}: {report.kind}, {report.names} names", soft_wrap=True)
    console.print(
        f"{report.parameters:,} parameters, {show_bytes(report.nbytes)} in {count} file{'s' * (count != 1)}"
        + (f"; {report.draft} tensors of draft layers are skipped" if report.draft else "")
    )
    if report.config is not None:
        console.print(_model(report.config), soft_wrap=True)
    if report.result_bytes:
        sizes = " or ".join(f"{show_bytes(n)} as {dtype}" for dtype, n in report.result_bytes.items())
        console.print(f"loaded: {sizes}")
    for title, rows in (("part", report.parts), ("type", report.dtypes)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, name in enumerate((title, "tensors", "parameters", "bytes")):
            table.add_column(name, justify="right" if i else "left", style="" if i else "dim", header_style="dim")
        for name, part in rows.items():
            note = " (skipped)" if name == draft else ""
            table.add_row(f"{name}{note}", f"{part.tensors:,}", f"{part.parameters:,}", show_bytes(part.nbytes))
        console.print()
        console.print(table)
    console.print()
    for name in ("missing", "surplus", "misshapen", "unsupported"):
        found = getattr(report, name)
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            console.print(f"{len(found)} {name}: {', '.join(found[:SHOWN])}{more}", soft_wrap=True)
    for problem in report.problems:
        if not problem[0].isdigit():  # those that are not lists of tensors
            console.print(problem, soft_wrap=True)
    console.print("it does not load as it is" if report.problems else "it loads: nothing is missing or surplus")


def _model(config: Any) -> str:
    kinds = Counter(spec.attn.name for spec in config.schedule)
    names = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return (
        f"{config.num_hidden_layers} layers ({names}), hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim}, {config.n_routed_experts} experts "
        f"({config.num_experts_per_tok} per token), vocabulary of {config.vocab_size}"
    )
