"""What a checkpoint is, from its headers and its configuration alone; no tensor is read."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections import Counter
from typing import Any

from dsv4_jax.files.safetensors_file import Checkpoint, open_checkpoint
from dsv4_jax.files.system_errors import in_words
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.checkpoint import held_as_stored, held_bytes, result_bytes
from dsv4_jax.model.files.quantisation import check_quantisation
from dsv4_jax.model.files.tensor_match import compare_tensors
from dsv4_jax.model.files.tensor_names import canonical_name, expected_tensors, is_draft, is_skipped, is_vision

#: Parts of the model, each with what its canonical names look like; the first that fits counts.
_PARTS = {
    "embedding and head": r"(embed|head)\.weight",
    "routed experts": r".*\.ffn\.experts\..*",
    "shared experts": r".*\.ffn\.shared_experts\..*",
    "routers": r".*\.ffn\.gate\..*",
    "compressors and indexers": r".*\.attn\.(compressor|indexer)\..*",
    "attention": r".*\.attn\..*",
    "residual streams and norms": r".*(hc_|norm).*",
}
DRAFT, VISION, OTHER = "draft layers", "vision parts", "other"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model in the files.

    Attributes:
      tensors: how many, scales counted.
      parameters: values; an FP4 byte holds two, scales are none.
      nbytes: of the tensors, scales included.
    """

    tensors: int
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` found.

    Attributes:
      path: what was inspected.
      kind: one phrase: how the weights are stored.
      names: "Hugging Face" or "release".
      config: the model, or None where there is no config.json.
      files: file name -> bytes of its tensors.
      parts: part of the model -> its size in the files, largest first.
      dtypes: safetensors' type -> tensors and bytes.
      result_bytes: bytes of the loaded weights by what they are held as: "as stored" (where the tensors agree with the
        configuration), "bfloat16" and "float32"; without a configuration it is empty.
      problems: what keeps it from loading, a sentence each; empty where it loads.
      missing, surplus, misshapen, unsupported: names of tensors, as `compare_tensors` has them.
      draft: tensors of draft (MTP) layers; they are skipped.
      vision: tensors of what reads pictures; they are skipped.
      absent: how many of these are in files that are not there, because nothing else is in them.
    """

    path: str
    kind: str
    names: str
    config: DSV4Config | None
    files: dict[str, int]
    parts: dict[str, Part]
    dtypes: dict[str, Part]
    result_bytes: dict[str, int]
    problems: tuple[str, ...]
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    draft: int = 0
    vision: int = 0
    absent: int = 0

    @property
    def parameters(self) -> int:
        """Of all parts, those that are skipped not counted."""
        return sum(part.parameters for name, part in self.parts.items() if name not in (DRAFT, VISION))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(self.files.values())


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointReport:
    """Reads the headers of a checkpoint, and compares them with config.json where there is one.

    Raises:
      FileNotFoundError: no checkpoint there, or a shard missing.
      ValueError: a file that `open_checkpoint` refuses.
    """
    config, problems = None, []
    if os.path.isfile(path):
        problems.append(f"{os.fspath(path)}: a file by itself: give its folder to compare it with its config.json")
    else:
        try:
            config = DSV4Config.from_hf(path)
        except OSError as error:
            problems.append(in_words(error))
        except ValueError as error:
            problems.append(str(error))
    checkpoint = open_checkpoint(path, functools.partial(is_skipped, config=config) if config else lambda name: False)
    found: dict[str, Any] = {"absent": len(checkpoint.absent)}
    loaded = {}
    if config is None:
        try:
            check_quantisation(checkpoint)
        except ValueError as error:
            problems.append(str(error))
    else:
        try:
            check_quantisation(checkpoint, config)
            compared = compare_tensors(checkpoint, config)
        except ValueError as error:
            problems.append(str(error))
        else:
            for field in ("missing", "surplus", "misshapen", "unsupported"):
                found[field] = getattr(compared, field)
                if count := len(found[field]):
                    problems.append(f"{count} tensor{'s are' if count > 1 else ' is'} {field}")
            found |= {"draft": len(compared.matched.skipped), "vision": len(compared.matched.vision)}
            if not (found["missing"] or found["unsupported"] or found["misshapen"]):
                held = held_as_stored(checkpoint, compared.matched, config)
                loaded["as stored"] = held_bytes(config, held)
            loaded |= {dtype: result_bytes(config, dtype) for dtype in ("bfloat16", "float32")}
    canonical = {name: canonical_name(name) for name in checkpoint}
    values = _values(checkpoint, canonical, expected_tensors(config) if config and "missing" in found else {})
    return CheckpointReport(
        path=os.fspath(path),
        kind=_kind(checkpoint),
        names="Hugging Face" if any(name.startswith("model.") for name in checkpoint) else "release",
        config=config,
        files={name: sum(file.info(t).nbytes for t in file) for name, file in checkpoint.files.items()},
        parts=_sizes(checkpoint, {name: _part(c, config) for name, c in canonical.items()}, values),
        dtypes=_sizes(checkpoint, {name: checkpoint.info(name).dtype for name in checkpoint}, values),
        result_bytes=loaded,
        problems=tuple(problems),
        **found,
    )


def _kind(checkpoint: Checkpoint) -> str:
    types = Counter(
        checkpoint.info(name).dtype for name in checkpoint if not canonical_name(name).endswith((".scale", "_scale_2"))
    )
    packed = sum(types[dtype] for dtype in ("I8", "U8", "F4"))
    if types["F8_E4M3"]:
        return "FP8 weights and FP4 experts, as released" if packed else "FP8 weights"
    if packed:
        return "FP4 weights"
    floats = [dtype for dtype, _ in types.most_common() if dtype in ("BF16", "F16", "F32")]
    words = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    return f"{' and '.join(words[dtype] for dtype in floats)} weights" if floats else "no weights"


def _part(canonical: str, config: DSV4Config | None) -> str:
    if is_vision(canonical):
        return VISION
    if canonical.startswith("mtp.") or (config is not None and is_draft(canonical, config)):
        return DRAFT
    for part, pattern in _PARTS.items():
        if re.fullmatch(pattern, canonical):
            return part
    return OTHER


def _values(checkpoint: Checkpoint, canonical: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """How many parameters each tensor has; scales are none, a byte of FP4 is two."""
    values = {}
    for name, short in canonical.items():
        info = checkpoint.info(name)
        values[name] = 0 if short.endswith(".scale") else math.prod(info.shape)
        if info.dtype in ("I8", "U8") and short.endswith(".weight") and info.shape != shapes.get(short):
            values[name] *= 2
    return values


def _sizes(checkpoint: Checkpoint, group_of: dict[str, str], values: dict[str, int]) -> dict[str, Part]:
    totals: dict[str, list[int]] = {}
    for name, group in group_of.items():
        total = totals.setdefault(group, [0, 0, 0])
        for i, more in enumerate((1, values[name], checkpoint.info(name).nbytes)):
            total[i] += more
    return {group: Part(*total) for group, total in sorted(totals.items(), key=lambda item: -item[1][2])}
