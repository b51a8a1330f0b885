"""What `dsv4-jax inspect` found in a file or folder, as tables."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files.untrusted_json import shorten
from .sizes import show_bytes

SHOWN = 5


def show_checkpoint(report: Any) -> None:
    """Prints a CheckpointReport to stdout."""
    console = _console()
    count = len(report.files)
    skipped = {"draft layers": report.draft, "vision parts": report.vision}
    words = "".join(f"; {n} tensors of {part} are skipped" for part, n in skipped.items() if n)
    if report.absent:
        words += f"; {report.absent} of them are in files that are not there"
    console.print(f"{report.path}: {report.kind}, {report.names} names", soft_wrap=True)
    console.print(
        f"{report.parameters:,} parameters, {show_bytes(report.nbytes)} in {count} file{'s' * (count != 1)}" + words,
        soft_wrap=True,
    )
    if report.config is not None:
        console.print(_model(report.config), soft_wrap=True)
    if report.result_bytes:
        sizes = " or ".join(
            f"{show_bytes(n)} {'' if how == 'as stored' else 'as '}{how}" for how, n in report.result_bytes.items()
        )
        console.print(f"loaded: {sizes}")
    for title, rows in (("part", report.parts), ("type", report.dtypes)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, name in enumerate((title, "tensors", "parameters", "bytes")):
            table.add_column(name, justify="right" if i else "left", style="" if i else "dim", header_style="dim")
        for name, part in rows.items():
            note = " (skipped)" if name in skipped else ""
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


def snapshot_report(path: str, snapshot: Any) -> dict[str, Any]:
    """What a Snapshot holds, as the object of --json; ValueError for one that no cache can have written."""
    _check_snapshot(path, snapshot)
    parts: dict[str, int] = {}
    for name, array in snapshot.arrays.items():
        kind, part = name.split(".")[:2]
        parts[f"{kind} {part}"] = parts.get(f"{kind} {part}", 0) + array.nbytes
    schema = next(iter(snapshot.schemas.values()), None)
    return {
        "path": path,
        "length": snapshot.length,
        "rollback": snapshot.rollback,
        "layers": dict(Counter(snapshot.layers)),
        "records": schema and schema.cache_dtype,
        "indexer": schema and schema.indexer_dtype,
        "hca_tail": schema and schema.hca_tail,
        "fingerprint": snapshot.fingerprint,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "state_bytes": snapshot.state_nbytes,
        "bytes": snapshot.nbytes,
    }


def _check_snapshot(path: str, snapshot: Any) -> None:
    """A checksum says that a file is as it was written, not by whom: what is shown is looked at first."""
    from ..cache.formats import INDEXER_FORMATS, RECORD_FORMATS
    from ..cache.schema import HCA_TAILS, KINDS

    def require(good: bool, what: str, got: object, expected: str) -> None:
        if not good:
            raise ValueError(f"{path}: {what} is {shorten(got)}: expected {expected}")

    layers, schemas = snapshot.layers, snapshot.schemas
    require(bool(layers) and all(kind in KINDS for kind in layers), "layers", layers, f"kinds of {', '.join(KINDS)}")
    require(set(schemas) == set(layers), "schemas", list(schemas), "one for every kind of layer")
    for schema in schemas.values():
        for what, names in (
            ("cache_dtype", RECORD_FORMATS),
            ("indexer_dtype", INDEXER_FORMATS),
            ("hca_tail", HCA_TAILS),
        ):
            got = getattr(schema, what)
            require(isinstance(got, str) and got in names, what, got, f"one of {', '.join(names)}")
    for what in ("length", "rollback"):
        got = getattr(snapshot, what)
        require(0 <= got < 1 << 31, what, got, "a number of tokens")
    got = snapshot.fingerprint
    require(re.fullmatch("[0-9a-f]{64}", got) is not None, "fingerprint", got, "64 hexadecimal digits")
    for name in snapshot.arrays:
        require(re.fullmatch(r"[a-z]+(\.[a-z_]+)+", name) is not None, "the name of an array", name, "kind and part")


def show_snapshot(report: Mapping[str, Any]) -> None:
    """Prints a `snapshot_report` to stdout."""
    console = _console()
    layers = ", ".join(f"{n} {kind.upper()}" for kind, n in report["layers"].items())
    rollback = f", {report['rollback']} of them can be rolled back" if report["rollback"] else ""
    console.print(f"{report['path']}: a snapshot of a request, as it was written", soft_wrap=True)
    console.print(f"{report['length']:,} tokens{rollback}; {sum(report['layers'].values())} layers ({layers})")
    tails = ", running sums in HCA tails" * (report["hca_tail"] == "running")
    console.print(f"{report['records']} records, {report['indexer']} indexer keys{tails}")
    console.print(f"fingerprint of the model: {report['fingerprint']}\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(("part", "bytes")):
        table.add_column(name, justify="right" if i else "left", style="" if i else "dim", header_style="dim")
    for name, count in report["parts"].items():
        table.add_row(name, show_bytes(count))
    console.print(table)
    console.print(f"\n{show_bytes(report['bytes'])}, {show_bytes(report['state_bytes'])} of it whatever the length")


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)
