"""`dsv4-jax inspect`: what a checkpoint is and whether it loads; what the cache of a small run holds, step by step."""

import dataclasses
import json
import os
import pathlib
import sys
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import InputError
from .files import written_whole
from .options import CacheDtype
from .prompts import check_prompts, make_codec, parse_tokens
from .sizes import show_bytes
from .terminal import in_background, make_bytes_progress, make_console, status

SHOWN = 5


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or a safetensors file.")],
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Run the model on this prompt and show its cache; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="Such a prompt as token ids; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Decode steps of a run.")] = 3,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records in a run.")] = CacheDtype.fp8,
    picture: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Also draw the states of a run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Says what a checkpoint holds: kind, layers, sizes, types, and what is missing or surplus.

    Only headers and config.json are read, no tensor. The exit status is 0 where `generate` could load it and 1 where
    something keeps it from that; draft layers are skipped and counted.

    With --run the model runs instead: it prefills every prompt, decodes some tokens, forks the first request and ends
    it; after each step its cache is shown: rings, tails, blocks, and who owns what.

    Examples: dsv4-jax inspect DeepSeek-V4-Flash; dsv4-jax inspect my-checkpoint --run 'def main():' --picture state.svg
    """
    console = make_console(quiet)
    if run or tokens:
        _run(pathlib.Path(path), run or [], tokens or [], steps, cache.value, picture, as_json, console)
        return 0
    if picture is not None:
        raise InputError("--picture draws the states of a run: give a prompt with --run")
    from dsv4_jax.model.inspection import inspect_checkpoint

    with status(console, f"reading the headers of {path}"):
        report = inspect_checkpoint(pathlib.Path(path))
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"parameters": report.parameters, "bytes": report.nbytes}))
    else:
        _show(report)
    return 1 if report.problems else 0


def _run(
    folder: pathlib.Path, texts: list[str], tokens: list[str], steps: int, cache: str, picture: str | None,
    as_json: bool, console: Console,
) -> None:  # fmt: skip
    """A small run: its states as text or JSON to stdout as they come, and as a picture."""
    from .small_run import small_run
    from .state_svg import picture as draw
    from .state_text import lines

    if picture is not None and not picture.endswith(".svg"):
        raise InputError(f"--picture {picture}: expected the name of an .svg file")
    ids = [parse_tokens(text) for text in tokens]
    with make_bytes_progress(console) as bar:
        task = bar.add_task("loading", total=None)
        import dsv4_jax

        model = dsv4_jax.from_pretrained(
            folder, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    codec = make_codec(folder, model.config.vocab_size)
    prompts = check_prompts([*(codec.encode(os.fsencode(text)) for text in texts), *ids], model.config.vocab_size)
    states = []
    with status(console, "running"):
        for title, state in in_background(lambda: small_run(model, prompts, steps, cache)):
            states.append((title, state))
            if not as_json:
                print("\n".join([title, *lines(state), ""]), flush=True)
    if picture is not None:
        with written_whole(picture) as temporary:
            temporary.write_text(draw(states))
    if as_json:
        print(json.dumps({"steps": [{"step": title, **dataclasses.asdict(state)} for title, state in states]}))


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
