"""`dsv4-jax quantize`: a checkpoint in the released form."""

import dataclasses
import json
import sys
import time
from typing import Annotated

import typer

from .errors import InputError
from .sizes import parse_bytes, show_bytes
from .terminal import make_bytes_progress, make_console, show_seconds


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a float32, float16 or bfloat16 checkpoint.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to make; it must not exist, or be empty.")],
    shard_size: Annotated[
        str, typer.Option(metavar="BYTES", help="Most bytes of tensors in one file: 5GB, 500MiB or plain bytes.")
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Converts a checkpoint to the form DeepSeek-V4 was released in: FP8 weights and FP4 experts.

    Attention and shared experts become E4M3 with a power-of-two scale per 128x128, routed experts E2M1 with one per 32
    values; the rest is bfloat16 and float32, as in the release. Names are the release's, files are sharded with an
    index. DST appears when all of it is written; after an error or Ctrl-C it is not there.

    Example: dsv4-jax quantize my-checkpoint my-checkpoint-fp8 --shard-size 2GB
    """
    from dsv4_jax.model.files.released_form import quantise_checkpoint

    console = make_console(quiet)
    shard_bytes = parse_bytes(shard_size, "--shard-size")
    if not shard_bytes:
        raise InputError(f"--shard-size {shard_size}: expected at least one byte")
    start = time.perf_counter()
    with make_bytes_progress(console) as progress:
        task = progress.add_task("converting", total=None)
        report = quantise_checkpoint(
            source, target, shard_bytes=shard_bytes,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps({"source": source, "target": target, **dataclasses.asdict(report)}))
        sys.stdout.flush()
    draft = f" ({report.draft} of them of draft layers)" if report.draft else ""
    console.print(
        f"{report.fp8} weights in FP8, {report.fp4} in FP4, {report.other} other tensors{draft}\n"
        f"{show_bytes(report.source_bytes)} became {show_bytes(report.target_bytes)} in {len(report.files)} "
        f"file{'s' * (len(report.files) > 1)}, in {show_seconds(time.perf_counter() - start)}: {target}",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip
