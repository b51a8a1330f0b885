"""From a checkpoint's files to the arrays of a model.

Weights may be stored as float32, float16 or bfloat16, or as released checkpoints have them: E4M3 with a scale per
128x128, and E2M1 experts, two values a byte, with a scale per 32 (see `weight_formats`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.files.safetensors_file import Checkpoint, TensorInfo, open_checkpoint
from dsv4_jax.files.untrusted_json import read_json_object, shorten
from dsv4_jax.model.config import MAX_CONFIG_BYTES, DSV4Config
from dsv4_jax.model.tensor_names import canonical_name, expected_tensors, is_draft, keeps_float32, scale_name
from dsv4_jax.model.weight_formats import BLOCK, GROUP, dequantise, scale_shape

_log = logging.getLogger(__name__)

_EXPERT = re.compile(r"(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I32", "I64")
#: safetensors' types of weights with scales -> the form. Releases tag FP4 pairs as I8.
_FORM_OF_TYPE = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4", "F4": "fp4"}
_SCALES = ("F8_E8M0", "F32")
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_SHOWN = 5

Progress = Callable[[int, int], None]
"""Called with bytes of the result that are done, and of all of it."""


@dataclasses.dataclass(frozen=True)
class MatchedTensors:
    """What a checkpoint holds, next to what the model needs.

    Attributes:
      stored: canonical name -> name in the checkpoint, for every tensor the model has and for the scales of those
        that are quantised.
      forms: canonical name -> "fp8" or "fp4", for every weight that is quantised.
      skipped: names in the checkpoint of tensors of draft (MTP) layers, which are not loaded.
    """

    stored: Mapping[str, str]
    forms: Mapping[str, str]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a checkpoint differs from what a configuration implies; each list names tensors as files do.

    Attributes:
      matched: what agrees.
      unsupported: stored in a type this library does not read, with the type.
      missing: canonical names that no file has.
      surplus: in the files, but no part of the model.
      misshapen: with both shapes.
    """

    matched: MatchedTensors
    unsupported: tuple[str, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    misshapen: tuple[str, ...]


def compare_tensors(checkpoint: Checkpoint, config: DSV4Config) -> Comparison:
    """Compares a checkpoint's headers with what `config` needs; reads no tensor.

    Raises:
      ValueError: one tensor under two names, or far fewer tensors than the configuration's experts alone.
    """
    # Before the expected names are listed: the configuration may be the one that lies.
    at_least = config.num_hidden_layers * config.n_routed_experts * 3
    if len(checkpoint) < at_least:
        raise ValueError(
            f"{checkpoint.path}: holds {len(checkpoint)} tensors: expected more than {at_least} "
            f"for {config.num_hidden_layers} layers of {config.n_routed_experts} experts"
        )
    model = expected_tensors(config)
    stored: dict[str, str] = {}
    skipped: list[str] = []
    for name in checkpoint:
        canonical = canonical_name(name)
        if is_draft(canonical, config):
            skipped.append(name)
        elif stored.setdefault(canonical, name) != name:
            raise ValueError(
                f"{checkpoint.path_of(name)}: {shorten(name)} and {shorten(stored[canonical])} "
                "are names of the same tensor: expected one of them"
            )

    forms: dict[str, str] = {}
    unsupported: list[str] = []
    expected: dict[str, tuple[int, ...]] = {}  # as files have them: scales beside, and two FP4 values in a byte
    for canonical, shape in model.items():
        expected[canonical] = shape
        if canonical not in stored:
            continue
        info = checkpoint.info(stored[canonical])
        form = _form(canonical, shape, info)
        if form is None:
            unsupported.append(f"{shorten(stored[canonical])} ({info.dtype})")
        elif form != "plain":
            forms[canonical] = form
            scales = scale_name(canonical)
            rows, columns = shape
            expected[scales] = scale_shape(form, (rows, columns))
            if form == "fp4" and info.dtype != "F4":
                expected[canonical] = (rows, columns // 2)
            if scales in stored and checkpoint.info(stored[scales]).dtype not in _SCALES:
                unsupported.append(f"{shorten(stored[scales])} ({checkpoint.info(stored[scales]).dtype})")

    tied_head = {"head.weight"} if config.tie_word_embeddings else set()
    misshapen = []
    for canonical, shape in expected.items():
        got = checkpoint.info(stored[canonical]).shape if canonical in stored else shape
        if got != shape:
            misshapen.append(f"{stored[canonical]} is {got} instead of {shape}")
    return Comparison(
        MatchedTensors(stored, forms, tuple(skipped)),
        unsupported=tuple(unsupported),
        missing=tuple(name for name in expected if name not in stored),
        surplus=tuple(shorten(name) for c, name in stored.items() if c not in expected and c not in tied_head),
        misshapen=tuple(misshapen),
    )


def match_tensors(checkpoint: Checkpoint, config: DSV4Config) -> MatchedTensors:
    """Like `compare_tensors`, for a checkpoint that must agree.

    Raises:
      ValueError: what `compare_tensors` raises, and tensors stored in a type that is not supported, missing (scales
        too), surplus or misshapen (the first few are named, and how many).
    """
    found = compare_tensors(checkpoint, config)
    for problem, names, hint in (
        (
            "stored in a type that is not supported",
            found.unsupported,
            f"expected {', '.join(_FLOATS)} (weights also F8_E4M3, or FP4 as I8, U8 or F4, with scales as "
            f"{' or '.join(_SCALES)}), and {' or '.join(_INTEGERS)} for tid2eid",
        ),
        ("missing", found.missing, "expected those that config.json implies"),
        ("surplus", found.surplus, "expected those that config.json implies"),
        ("misshapen", found.misshapen, "expected the shapes config.json implies"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            verb = "tensor is" if len(names) == 1 else "tensors are"
            raise ValueError(
                f"{checkpoint.path}: {len(names)} {verb} {problem}: {', '.join(names[:_SHOWN])}{more}; {hint}"
            )
    return found.matched


def _form(canonical: str, shape: tuple[int, ...], info: TensorInfo) -> str | None:
    """How a tensor is stored: "plain", "fp8", "fp4", or None for a type this tensor cannot have."""
    if canonical.endswith(".tid2eid"):
        return "plain" if info.dtype in _INTEGERS else None
    if info.dtype in _FLOATS:
        return "plain"
    form = _FORM_OF_TYPE.get(info.dtype)
    if len(shape) != 2 or not canonical.endswith(".weight") or (form == "fp4" and shape[1] % GROUP):
        return None
    return form


def read_tensors(
    path: str | os.PathLike[str],
    config: DSV4Config | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of `load_tensors` one after the other, each as soon as it is read.

    Everything is checked, and refused, before the first is read. Files are mapped and let go of tensor by tensor: what
    is held here is one tensor (one layer's stack of w1, w2 or w3 where experts are concerned).
    """
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype is {shorten(dtype)}: expected float32 or bfloat16") from None
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}: expected float32 or bfloat16")
    if config is None:
        config = DSV4Config.from_hf(path)
    checkpoint = open_checkpoint(path)
    matched = match_tensors(checkpoint, config)
    if matched.forms:
        _check_quantisation(checkpoint.path)
    if matched.skipped:
        _log.info("skipped %d tensors of draft layers", len(matched.skipped))
    return _read_all(checkpoint, matched, config, dtype, progress or (lambda done, total: None))


def load_tensors(
    path: str | os.PathLike[str],
    config: DSV4Config | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Loads a checkpoint's tensors.

    Everything is checked before memory is taken; then one tensor at a time is read from the
    mapped file and cast, so that the peak is near the size of the result.

    Args:
      path: the checkpoint's folder, as for `open_checkpoint`.
      config: the model; None reads the folder's `config.json`.
      dtype: float32 or bfloat16, for the weights. Norms, hc_*, attn_sink, ape and the router's
        bias stay float32; tid2eid becomes int32. Quantised weights are exact in both.
      progress: called after every tensor.

    Returns:
      Canonical name -> array of its own memory. Linear weights are (out, in) as stored. The
      experts of a layer are stacked: `layers.N.ffn.experts.w1` and `.w3` are (experts,
      moe_intermediate_size, hidden_size), `.w2` is (experts, hidden_size, moe_intermediate_size).
      `head.weight` is the embedding itself where the configuration ties them.

    Raises:
      FileNotFoundError: no checkpoint, no config.json, or a shard missing.
      ValueError: files that `open_checkpoint` refuses, tensors that `match_tensors` refuses, a
        tid2eid that names experts the model does not have, scales that are not finite, blocks of a
        size other than 128x128, more bytes than the machine has, or an unknown dtype.
    """
    if config is None:
        config = DSV4Config.from_hf(path)
    tensors = read_tensors(path, config, dtype, progress)
    check_memory(result_bytes(config, dtype), os.fspath(path))
    return dict(tensors)


def result_bytes(config: DSV4Config, dtype: Any) -> int:
    """Bytes of what `load_tensors` returns."""
    sizes = (
        math.prod(shape) * _result_dtype(n, np.dtype(dtype)).itemsize for n, shape in expected_tensors(config).items()
    )
    return sum(sizes)


def check_memory(needed: int, what: str) -> None:
    """Raises ValueError where the machine has less memory than `needed` bytes, as far as it can be known."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if needed > installed:
        raise ValueError(
            f"{what}: its tensors take {needed / 2**30:.1f} GiB, but this machine has {installed / 2**30:.1f} GiB of "
            "memory: expected a smaller checkpoint, or dtype bfloat16 instead of float32"
        )


def _result_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    if name.endswith(".tid2eid"):
        return np.dtype(np.int32)
    return np.dtype(np.float32) if keeps_float32(name) else dtype


def _read_all(
    checkpoint: Checkpoint, matched: MatchedTensors, config: DSV4Config, dtype: np.dtype[Any], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    total, done = result_bytes(config, dtype), 0
    stacks: dict[str, np.ndarray] = {}
    embedding: np.ndarray | None = None
    for name, shape in expected_tensors(config).items():
        stored = matched.stored[name]
        if expert := _EXPERT.fullmatch(name):
            stack, index = f"{expert[1]}.{expert[3]}", int(expert[2])
            if stack not in stacks:
                stacks[stack] = np.empty((config.n_routed_experts, *shape), dtype)
            out = stacks[stack][index]
        else:
            stack, index = "", 0
            out = np.empty(shape, _result_dtype(name, dtype))
        if name in matched.forms:
            scales = matched.stored[scale_name(name)]
            try:
                dequantise(matched.forms[name], checkpoint.read(stored), checkpoint.read(scales), out)
            except ValueError as error:
                raise ValueError(f"{checkpoint.path_of(scales)}: {scales}: {error}") from None
            checkpoint.forget(scales)
        else:
            raw = checkpoint.read(stored)
            if name.endswith(".tid2eid"):
                _check_expert_table(raw, config, checkpoint.path_of(stored), name)
            out[...] = raw
            del raw
        checkpoint.forget(stored)
        done += out.nbytes
        progress(done, total)
        if not stack:
            embedding = out if name == "embed.weight" and config.tie_word_embeddings else embedding
            yield name, out
        elif index == config.n_routed_experts - 1:
            yield stack, stacks.pop(stack)
        del out
    if embedding is not None:
        head = matched.stored.get("head.weight")
        if head is not None and not _same(checkpoint, head, matched.stored["embed.weight"]):
            raise ValueError(
                f"{checkpoint.path_of(head)}: {head} differs from the embedding: expected the "
                "same, as tie_word_embeddings is true"
            )
        yield "head.weight", embedding


def _check_quantisation(folder: str) -> None:
    """What config.json says of quantised weights, where there is one: blocks of another size are refused."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return
    quantised = read_json_object(path, max_bytes=MAX_CONFIG_BYTES).get("quantization_config")
    if not isinstance(quantised, Mapping):
        return
    for key, expected in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", [BLOCK, BLOCK])):
        got = quantised.get(key)
        if got is not None and got != expected:
            raise ValueError(f"{path}: quantization_config.{key} is {shorten(got)}: expected {expected!r}")


def _same(checkpoint: Checkpoint, left: str, right: str) -> bool:
    a, b = checkpoint.read(left), checkpoint.read(right)
    return a.shape == b.shape and bool(np.array_equal(a.astype(np.float32), b.astype(np.float32)))


def _check_expert_table(raw: np.ndarray, config: DSV4Config, path: str, name: str) -> None:
    experts = config.n_routed_experts
    outside = (raw < 0) | (raw >= experts)
    if outside.any():
        token, pick = np.argwhere(outside)[0]
        raise ValueError(
            f"{path}: {name}[{token}, {pick}] is {raw[token, pick]}: expected an expert from 0 to {experts - 1}"
        )
