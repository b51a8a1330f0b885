"""`dsv4-jax inspect`: what a checkpoint is and whether it loads; what the cache of a small run holds, step by step."""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from ..files.written_whole import written_whole
from .errors import InputError
from .inspect_report import show_checkpoint, show_snapshot, snapshot_report
from .loading import load_model
from .options import CacheDtype
from .prompts import check_prompts, make_codec, parse_tokens
from .terminal import in_background, make_console, status


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a checkpoint, or file of a snapshot.")],
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Run the model on this prompt and show its cache; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3", help="Such a prompt as token ids; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=0, max=1000, help="Decode steps of a run.")] = 3,
    cache: Annotated[CacheDtype, typer.Option(help="Storage of key-value records in a run.")] = CacheDtype.fp8,
    picture: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Also draw the states of a run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Says what a checkpoint holds: kind, layers, sizes, types, and what is missing or surplus.

    Only headers and config.json are read, no tensor. The exit status is 0 where `generate` could load it and 1 where
    something keeps it from that; draft layers are skipped and counted. Of a request's snapshot: its length, layers,
    formats, bytes by part, and the fingerprint of its model; all of it is read, and checked against its checksum.

    With --run the model runs instead: it prefills every prompt, decodes some tokens, forks the first request and ends
    it; after each step its cache is shown: rings, tails, blocks, and who owns what.

    Examples: dsv4-jax inspect DeepSeek-V4-Flash; dsv4-jax inspect my-checkpoint --run 'def main():' --picture state.svg
    """
    console = make_console(quiet)
    if run or tokens:
        wanted = Wanted(run or [], tokens or [], steps, cache.value)
        _run(pathlib.Path(path), wanted, picture, as_json, console)
        return 0
    if picture is not None:
        raise InputError("--picture draws the states of a run: give a prompt with --run")
    if _is_snapshot(path):
        from ..cache.transfer.snapshot_file import load_snapshot

        with status(console, f"reading {path}"):
            request = snapshot_report(path, load_snapshot(path))
        if as_json:
            print(json.dumps(request))
        else:
            show_snapshot(request)
        return 0
    from ..model.files.inspection import inspect_checkpoint

    with status(console, f"reading the headers of {path}"):
        report = inspect_checkpoint(path)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"parameters": report.parameters, "bytes": report.nbytes}))
    else:
        show_checkpoint(report)
    return 1 if report.problems else 0


def _is_snapshot(path: str) -> bool:
    """Whether this is a file of `save_snapshot`; ValueError for a file that is no safetensors file at all."""
    if not os.path.isfile(path):
        return False
    from ..cache.transfer.snapshot_file import FORMAT
    from ..files.safetensors_file import SafetensorsFile

    return SafetensorsFile(path).metadata.get("format") == FORMAT


class Wanted(NamedTuple):
    """A small run: prompts as texts and as token ids, decode steps, the cache's records."""

    texts: list[str]
    tokens: list[str]
    steps: int
    cache: str


def _run(folder: pathlib.Path, wanted: Wanted, picture: str | None, as_json: bool, console: Console) -> None:
    """A small run: its states as text or JSON to stdout as they come, and as a picture."""
    from .small_run import small_run
    from .state_svg import picture as draw
    from .state_text import lines

    if picture is not None and not picture.endswith(".svg"):
        raise InputError(f"--picture {picture}: expected the name of an .svg file")
    ids = [parse_tokens(text) for text in wanted.tokens]
    # A picture that cannot be written is refused before anything runs.
    with written_whole(picture) if picture is not None else contextlib.nullcontext() as temporary:
        model = load_model(folder, console)
        codec = make_codec(folder, model.config.vocab_size)
        prompts = check_prompts([*(codec.encode(os.fsencode(text)) for text in wanted.texts), *ids], model.config)
        states = []
        with status(console, "running") as spinner:
            for title, state in in_background(lambda: small_run(model, prompts, wanted.steps, wanted.cache)):
                states.append((title, state))
                if not as_json:
                    spinner.stop()
                    print("\n".join([title, *lines(state), ""]), flush=True)
        if temporary is not None:
            temporary.write_text(draw(states), encoding="utf-8")
    if as_json:
        print(json.dumps({"steps": [{"step": title, **dataclasses.asdict(state)} for title, state in states]}))
