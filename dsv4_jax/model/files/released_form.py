"""Turning a checkpoint into the form DeepSeek-V4 was released in.

Names, types and shapes are those of DeepSeek-V4-Flash's files: attention projections, the indexer's query and shared
experts in E4M3 with a power-of-two scale per 128x128, routed experts in E2M1 with one per 32; embedding, head, norms,
router, compressors and `weights_proj` in bfloat16; hc_*, attn_sink, ape and the router's bias in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.files.safetensors_file import DTYPES, INDEX_FILE, Checkpoint, open_checkpoint
from dsv4_jax.files.safetensors_writer import TensorEntry, write_safetensors
from dsv4_jax.files.untrusted_json import read_json_object, shorten
from dsv4_jax.files.written_whole import CannotWriteError
from dsv4_jax.model.config import MAX_CONFIG_BYTES, DSV4Config
from dsv4_jax.model.files.checkpoint import Progress, check_parts
from dsv4_jax.model.files.quantisation import check_quantisation
from dsv4_jax.model.files.tensor_match import match_tensors
from dsv4_jax.model.files.tensor_names import (
    canonical_name,
    device_share,
    expected_tensors,
    keeps_float32,
    released_name,
    scale_name,
)
from dsv4_jax.model.files.weight_formats import BLOCK, quantise, scale_shape

DEFAULT_SHARD_BYTES = 5_000_000_000
#: What config.json says of such weights.
QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
_FP4 = re.compile(r".*\.ffn\.experts\.\d+\.w[123]\.weight")
_FP8 = re.compile(r".*\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|[eh]_proj)\.weight")
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS = ("I32", "I64")
#: Files that go with a checkpoint; they are copied.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip


def released_type(name: str) -> str:
    """How the release stores the tensor with this canonical name: "fp4", "fp8", or safetensors' name of a type."""
    if _FP4.fullmatch(name):
        return "fp4"
    if _FP8.fullmatch(name):
        return "fp8"
    if name.endswith(".tid2eid"):
        return "I64"
    return "F32" if keeps_float32(name) and not name.endswith("norm.weight") else "BF16"


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """What the weights of a model take.

    Attributes:
      stored: in files, draft layers not counted.
      held: in a device's memory, loaded as they are stored.
    """

    stored: int
    held: int


def released_bytes(config: DSV4Config, devices: int = 1, model_devices: int = 1) -> WeightBytes:
    """What the weights of this configuration take in the released form; no file is needed.

    devices, model_devices: what is held is that of each of so many devices (`device_share`).

    Raises:
      ValueError: devices along "model" that do not divide a tensor, or sizes that the released form cannot hold.
    """
    stored, held = 0, 0
    for name, shape in expected_tensors(config).items():
        form = released_type(name)
        check_parts(name, shape, form, model_devices)
        if form in ("fp8", "fp4"):
            rows, columns = shape
            nbytes = rows * columns // (2 if form == "fp4" else 1) + math.prod(scale_shape(form, (rows, columns)))
            stored, own = stored + nbytes, nbytes
        else:
            size = math.prod(shape)
            stored += size * DTYPES[form].itemsize
            own = size * (4 if name.endswith(".tid2eid") or keeps_float32(name) else DTYPES[form].itemsize)
        held += device_share(own, name, devices, model_devices)
    return WeightBytes(stored, held)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
      fp8, fp4, other: weights in each form, and tensors that are neither; scales are not counted.
      draft: how many of these belong to draft (MTP) layers.
      source_bytes, target_bytes: of all tensors before and after.
      files: names of the shards.
    """

    fp8: int
    fp4: int
    other: int
    draft: int
    source_bytes: int
    target_bytes: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor of the source, and what it becomes."""

    source: str
    form: str
    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def quantise_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the checkpoint in folder `source` to the new folder `target` in the released form.

    Draft layers are converted like the others. Everything is written to a temporary folder beside `target`, which takes
    its name at the end: after an error or Ctrl-C there is no `target`. One tensor is held in memory at a time.

    Args:
      source: a checkpoint in float32, float16 or bfloat16, with its config.json.
      target: does not exist yet, or is an empty folder.
      shard_bytes: tensor bytes of a file at most; a larger tensor has a file of its own.
      progress: called with bytes of the source that are done, and of all.

    Raises:
      FileNotFoundError: no checkpoint or config.json there, or no folder for `target` to be made in.
      ValueError: a checkpoint that `load_tensors` would refuse, that is quantised already, or has values that are not
        finite or weights whose rows are no multiple of 32 where FP4 is due; a target that exists; too little disk.
    """
    target = pathlib.Path(target)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}: expected at least 1")
    empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not empty:
        raise ValueError(f"{target}: exists already; expected the name of a new folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder to make {target.name} in")
    if os.path.isfile(source):
        raise ValueError(f"{os.fspath(source)} is a file: expected the folder of a checkpoint, with its config.json")
    config = DSV4Config.from_hf(source)
    checkpoint = open_checkpoint(source)
    jobs = _plan(checkpoint, config)
    shards = _shards(jobs, shard_bytes)
    needed, free = sum(job.nbytes for job in jobs), shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(f"{target}: {needed:,} bytes are to be written, but the disk has {free:,} left")
    with _folder_written_whole(target) as folder:
        _write_shards(checkpoint, shards, folder, progress or (lambda done, total: None))
        raw = read_json_object(os.path.join(source, "config.json"), max_bytes=MAX_CONFIG_BYTES)
        _write_json(folder / "config.json", {**raw, "expert_dtype": "fp4", "quantization_config": QUANTISATION})
        for name in _COMPANIONS:
            if os.path.isfile(os.path.join(source, name)):
                shutil.copyfile(os.path.join(source, name), folder / name)
    forms = [job.form for job in jobs]
    return Conversion(
        fp8=forms.count("fp8"),
        fp4=forms.count("fp4"),
        other=len(forms) - forms.count("fp8") - forms.count("fp4"),
        draft=len(match_tensors(checkpoint, config).skipped),
        source_bytes=sum(checkpoint.info(job.source).nbytes for job in jobs),
        target_bytes=needed,
        files=tuple(shards),
    )


def _plan(checkpoint: Checkpoint, config: DSV4Config) -> list[_Job]:
    check_quantisation(checkpoint, config)
    matched = match_tensors(checkpoint, config)
    if matched.forms:
        name = matched.stored[next(iter(matched.forms))]
        raise ValueError(
            f"{checkpoint.path}: {len(matched.forms)} weights are quantised already, such as {shorten(name)}: expected "
            f"tensors in {', '.join(_FLOATS)}"
        )
    jobs = []
    for name in (*matched.stored.values(), *matched.skipped, *matched.vision):
        canonical, info = canonical_name(name), checkpoint.info(name)
        form = released_type(canonical)
        if info.dtype not in (_INTEGERS if form == "I64" else _FLOATS):
            raise ValueError(
                f"{checkpoint.path_of(name)}: {shorten(name)} is {info.dtype}: expected "
                f"{', '.join(_INTEGERS if form == 'I64' else _FLOATS)}"
            )
        entries = [TensorEntry(released_name(canonical), form, info.shape)]
        if form in ("fp8", "fp4"):
            if len(info.shape) != 2:
                raise ValueError(f"{checkpoint.path_of(name)}: {shorten(name)} is {info.shape}: expected two sizes")
            rows, columns = info.shape
            try:
                scales = scale_shape(form, (rows, columns))
            except ValueError as error:
                raise ValueError(f"{checkpoint.path_of(name)}: {shorten(name)}: {error}") from None
            stored = ("F8_E4M3", (rows, columns)) if form == "fp8" else ("I8", (rows, columns // 2))
            entries = [
                TensorEntry(released_name(canonical), *stored),
                TensorEntry(released_name(scale_name(canonical)), "F8_E8M0", scales),
            ]
        jobs.append(_Job(name, form, tuple(entries)))
    return sorted(jobs, key=lambda job: _natural(job.entries[0].name))


def _natural(name: str) -> tuple[Any, ...]:
    """A sorting key that puts layer 10 after layer 9."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split("."))


def _shards(jobs: list[_Job], shard_bytes: int) -> dict[str, list[_Job]]:
    """File name -> what it holds, filled in order; in a file the widest types come first, so that all are aligned."""
    shards: list[list[_Job]] = []
    room = 0
    for job in jobs:
        if not shards or job.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(job)
        room -= job.nbytes
    for shard in shards:
        shard.sort(key=lambda job: -DTYPES[job.entries[0].dtype].itemsize)
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _write_shards(
    checkpoint: Checkpoint, shards: Mapping[str, list[_Job]], folder: pathlib.Path, progress: Progress
) -> None:
    total = sum(checkpoint.info(job.source).nbytes for shard in shards.values() for job in shard)
    done = 0

    def arrays(shard: list[_Job]) -> Iterator[np.ndarray]:
        nonlocal done
        for job in shard:
            yield from _convert(checkpoint, job)
            checkpoint.forget(job.source)
            done += checkpoint.info(job.source).nbytes
            progress(done, total)

    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        entries = [entry for job in shard for entry in job.entries]
        write_safetensors(folder / file, entries, arrays(shard))
        weight_map |= {entry.name: file for entry in entries}
    size = sum(job.nbytes for shard in shards.values() for job in shard)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _convert(checkpoint: Checkpoint, job: _Job) -> Iterator[np.ndarray]:
    raw = checkpoint.read(job.source)
    if job.form in ("fp8", "fp4"):
        try:
            yield from quantise(job.form, raw)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path_of(job.source)}: {job.source}{error}") from None
    else:
        yield raw.astype(np.int64 if job.form == "I64" else _FLOATS[job.form])


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _folder_written_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and is gone otherwise."""
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CannotWriteError(f"{target} cannot be made: {(error.strerror or str(error)).lower()}") from None
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.rename(target)  # an empty folder of that name gives way
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
