"""Time of the cache's native operations and of all that a step writes, on an NVIDIA GPU; what a cache costs in bytes.

Medians after a warm-up, random data, other arrays for every layer, together larger than the L2 cache where a bandwidth
is given; beside it a copy of as many bytes in the same run. Small calls are timed many to a jitted program, which XLA
replays as a CUDA graph; host time is included.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import gpu_attend
import gpu_cache
import gpu_flash
import gpu_reads
import gpu_select
import gpu_share
import gpu_slice
import gpu_step
import gpu_timing
import gpu_writes
import jax
import jax.numpy as jnp

from dsv4_jax.ops import dispatch


def rows() -> list[functools.partial[gpu_timing.Row]]:
    """All rows of the table, in order, not yet prepared."""
    f32, bf16 = jnp.float32, jnp.bfloat16
    made: list[functools.partial[gpu_timing.Row]] = []

    def row(benchmark: Callable[..., gpu_timing.Row], *args, **options) -> None:
        made.append(functools.partial(benchmark, *args, **options))

    for fused in (False, True):
        for dtype in (bf16, f32):
            row(gpu_writes.append_prefill, dtype, fused)
        for tokens in (1, 64, 256):
            row(gpu_writes.append_decode, tokens, fused)
    row(gpu_writes.append_prefill, bf16, False, form="fp8_ue8m0")
    for batch, target in ((64, 2.5), (256, 4.0)):
        row(gpu_writes.compress_decode, 4, 512, batch, True, target=target)
    row(gpu_writes.compress_decode, 4, 512, 64, True, layers=1, rounds=84)
    row(gpu_writes.compress_decode, 4, 512, 64, False, target=1.5)
    row(gpu_writes.compress_decode, 4, 512, 64, False, layers=1, rounds=84)
    row(gpu_writes.compress_decode, 4, 512, 64, True, form="fp8_ue8m0")
    row(gpu_writes.compress_decode, 128, 512, 64, True, target=13.0, layers=20)
    row(gpu_writes.compress_decode, 128, 512, 64, False, target=1.5, layers=20)
    row(gpu_writes.compress_decode, 128, 512, 64, True, running=True, target=2.5, layers=20)
    row(gpu_writes.compress_decode, 128, 512, 64, False, running=True, target=1.5, layers=20)
    for batch in (64, 256):
        row(gpu_writes.compress_decode, 4, 128, batch, True, keys="nvfp4")
    row(gpu_writes.compress_decode, 4, 128, 64, False, keys="nvfp4")
    for dtype in (f32, bf16):
        row(gpu_writes.compress_prefill, 4, 512, 8192, dtype, target=22.0)
        row(gpu_writes.compress_prefill, 128, 512, 8192, dtype)
        row(gpu_writes.compress_prefill, 128, 512, 8192, dtype, running=True)
        row(gpu_writes.compress_prefill, 4, 128, 8192, dtype, keys="nvfp4", layers=16)
    row(gpu_writes.compress_prefill, 4, 512, 8192, f32, per_slot=128)
    for form in ("fp8", "fp8_ue8m0"):
        row(gpu_reads.chosen_entries, form, bf16)
    row(gpu_reads.chosen_entries, "fp8", f32)
    row(gpu_reads.window, "fp8", bf16)
    row(gpu_reads.all_keys, "mxfp4")
    made.extend(gpu_attend.rows())
    made.extend(gpu_select.rows())
    for options in gpu_step.CACHES:
        for one_launch in (False, True):
            row(gpu_step.all_writes, steps=1, options=options, one_launch=one_launch, target=200.0)
            row(gpu_step.all_writes, steps=16, options=options, one_launch=one_launch, target=120.0)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu_results"), help="folder of the JSON file")
    parser.add_argument(
        "--only",
        choices=["attend", "cache", "flash", "reads", "select", "share", "slice", "step", "writes"],
        help="the rows of this part alone",
    )
    gpu_slice.add_options(parser)
    gpu_share.add_options(parser)
    gpu_flash.add_options(parser)
    options = parser.parse_args()
    if jax.default_backend() != "gpu" or "cuda" not in dispatch.available():
        sys.exit("bench gpu: needs an NVIDIA GPU, JAX with CUDA and the native library for it (scripts/build_ffi)")
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the numbers
    start = time.perf_counter()
    gpu_timing.run(row for row in rows() if options.only in (None, row.func.__module__.removeprefix("gpu_")))
    if options.only in (None, "step"):
        gpu_step.report_program()
        gpu_step.report_bytes()
    if options.only == "cache":
        gpu_cache.run()
    if options.only == "slice":
        gpu_slice.run(options)
    if options.only == "share":
        gpu_share.run(options)
    if options.only == "flash":
        gpu_flash.run(options)
    gpu_timing.fact("this benchmark", time.perf_counter() - start, "s")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {"device": driver, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    (out / "gpu.json").write_text(json.dumps({**about, "rows": gpu_timing.RESULTS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
