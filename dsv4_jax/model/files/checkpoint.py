"""From a checkpoint's files to the arrays of a model.

Weights may be stored as float32, float16 or bfloat16, or as released checkpoints have them: E4M3 with a scale per
128x128, and E2M1 experts, two values a byte, with a scale per 32 (see `weight_formats`). They are converted to one
type, or held in memory as they are stored.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv4_jax.files.safetensors_file import Checkpoint, open_checkpoint
from dsv4_jax.files.untrusted_json import shorten
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.quantisation import check_quantisation
from dsv4_jax.model.files.tensor_match import MatchedTensors, match_tensors
from dsv4_jax.model.files.tensor_names import (
    check_division,
    device_share,
    expected_tensors,
    is_skipped,
    keeps_float32,
    scale_name,
)
from dsv4_jax.model.files.weight_formats import dequantise, scale_bytes, scale_shape

_log = logging.getLogger(__name__)

_EXPERT = re.compile(r"(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: safetensors' types that are narrower than float32 and can be held as they are.
_NARROW = {"BF16": _BFLOAT16, "F16": np.dtype(np.float16)}
_BYTE = np.dtype(np.uint8)

Progress = Callable[[int, int], None]
"""Called with bytes of the result that are done, and of all of it."""


class Held(NamedTuple):
    """How a tensor of the model is held in memory.

    Attributes:
      form: "fp8" or "fp4" for codes and scales as they are stored, or None for numbers.
      dtype: of the array; uint8 for codes.
    """

    form: str | None
    dtype: np.dtype[Any]


def float_type(dtype: Any) -> np.dtype[Any]:
    """float32 or bfloat16; ValueError for another type."""
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in _DTYPES:
        raise ValueError(f"dtype is {shorten(dtype) if found is None else found}: expected float32 or bfloat16")
    return found


def held_as_stored(
    checkpoint: Checkpoint, matched: MatchedTensors, config: DSV4Config, dtype: Any = np.float32
) -> dict[str, Held]:
    """How each tensor is held where weights stay as they are stored: canonical name -> form and type.

    Projections in FP8 keep their codes and scales, and so do a layer's routed experts where all of them are FP4. Other
    quantised weights become bfloat16, in which they are exact. float16 and bfloat16 stay for a model that computes in
    float32, float32 becomes `dtype`; norms and the like are float32, tid2eid int32.
    """
    dtype = np.dtype(dtype)
    layers: dict[str, set[Held]] = {}
    held: dict[str, Held] = {}
    experts: list[tuple[str, str]] = []
    for name, shape in expected_tensors(config).items():
        form = matched.forms.get(name)
        expert = _EXPERT.fullmatch(name)
        if keeps_float32(name) or name.endswith(".tid2eid"):
            held[name] = Held(None, _result_dtype(name, dtype))
        elif form is None:
            narrow = _NARROW.get(checkpoint.info(matched.stored[name]).dtype, dtype)
            held[name] = Held(None, narrow if dtype == np.float32 else dtype)
        elif form == "fp4" if expert else form == "fp8" and _is_projection(name, shape):
            held[name] = Held(form, _BYTE)
        else:
            held[name] = Held(None, _BFLOAT16)
        if expert:
            layers.setdefault(expert[1], set()).add(held[name])
            experts.append((name, expert[1]))
    for name, layer in experts:  # they are one array: of mixed ones none can stay
        if len(layers[layer]) > 1:
            held[name] = Held(None, dtype)
    return held


def held_bytes(config: DSV4Config, held: Mapping[str, Held], devices: int = 1, model_devices: int = 1) -> int:
    """Bytes of tensors that are held like this, scales included; on each of so many devices (`device_share`).

    Raises:
      ValueError: devices along "model" that do not divide a tensor.
    """
    total = 0
    for name, shape in expected_tensors(config).items():
        check_parts(name, shape, held[name].form, model_devices)
        total += device_share(_nbytes(shape, held[name]), name, devices, model_devices)
    return total


def check_parts(name: str, shape: tuple[int, ...], form: str | None, model_devices: int) -> None:
    """ValueError where so many devices along an axis "model" do not divide a tensor, or its scales if it is held so."""
    check_division(name, shape, model_devices)
    if form == "fp8":
        check_division(scale_name(name), scale_shape(form, (shape[0], shape[1])), model_devices)


def _nbytes(shape: tuple[int, ...], held: Held) -> int:
    if held.form is None:
        return math.prod(shape) * held.dtype.itemsize
    rows, columns = shape
    return rows * columns // (2 if held.form == "fp4" else 1) + math.prod(scale_shape(held.form, (rows, columns)))


def _is_projection(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != "embed.weight" and not name.endswith(".ffn.gate.weight")


def read_tensors(
    path: str | os.PathLike[str],
    config: DSV4Config | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
    *,
    experts: Container[int] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of `load_tensors` one after the other, each as soon as it is read.

    Everything is checked, and refused, before the first is read. Files are mapped and let go of tensor by tensor: what
    is held here is one tensor (one layer's stack of w1, w2 or w3 where experts are concerned). experts: those that are
    read, where others are not needed here; what the stacks have in place of these is not defined.
    """
    return _open(path, config, dtype, progress, experts, as_stored=False)[1]


def read_stored_tensors(
    path: str | os.PathLike[str],
    config: DSV4Config | None = None,
    dtype: Any = np.float32,
    progress: Progress | None = None,
    *,
    experts: Container[int] | None = None,
    devices: int = 1,
    model_devices: int = 1,
) -> tuple[int, Iterator[tuple[str, np.ndarray]]]:
    """Like `read_tensors`, with weights held as they are stored (`held_as_stored`): bytes of all, and the tensors.

    Codes are uint8 under the name of the weight, scales follow them as E8M0 bytes: `layers.0.attn.wkv.weight` (out, in)
    and `layers.0.attn.wkv.scale`, `layers.0.ffn.experts.w1` (experts, out, in / 2) and `….experts.w1_scale` (experts,
    out, in / 32). devices, model_devices: the bytes are those of each of so many devices (`device_share`).
    """
    held, tensors = _open(path, config, dtype, progress, experts, as_stored=True)
    return held_bytes(*held, devices, model_devices), tensors


def _open(
    path: str | os.PathLike[str],
    config: DSV4Config | None,
    dtype: Any,
    progress: Progress | None,
    experts: Container[int] | None,
    *,
    as_stored: bool,
) -> tuple[tuple[DSV4Config, dict[str, Held]], Iterator[tuple[str, np.ndarray]]]:
    """How tensors are held, as `held_bytes` takes it, and the tensors."""
    dtype = float_type(dtype)
    if config is None:
        config = DSV4Config.from_hf(path)
    checkpoint = open_checkpoint(path, functools.partial(is_skipped, config=config))
    check_quantisation(checkpoint, config)
    matched = match_tensors(checkpoint, config)
    for what, names in (("draft layers", matched.skipped), ("vision parts", matched.vision)):
        if names:
            _log.info("skipped %d tensors of %s", len(names), what)
    if as_stored:
        held = held_as_stored(checkpoint, matched, config, dtype)
    else:
        held = {name: Held(None, _result_dtype(name, dtype)) for name in expected_tensors(config)}
    report = progress or (lambda done, total: None)
    return (config, held), _read_all(checkpoint, matched, config, held, experts, report)


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
        tid2eid that names experts the model does not have, scales that are not finite, weights
        quantised in another way, more bytes than the machine has, or an unknown dtype.
    """
    if config is None:
        config = DSV4Config.from_hf(path)
    tensors = read_tensors(path, config, dtype, progress)
    check_memory(result_bytes(config, dtype), os.fspath(path))
    return dict(tensors)


def result_bytes(config: DSV4Config, dtype: Any, devices: int = 1, model_devices: int = 1) -> int:
    """Bytes of what `load_tensors` returns; on each of so many devices (`device_share`)."""
    held = {name: Held(None, _result_dtype(name, np.dtype(dtype))) for name in expected_tensors(config)}
    return held_bytes(config, held, devices, model_devices)


def check_memory(needed: int, what: str) -> None:
    """Raises ValueError where the machine has less memory than `needed` bytes, as far as it can be known."""
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if needed > installed:
        raise ValueError(
            f"{what}: its tensors take {needed / 2**30:,.1f} GiB, {(needed - installed) / 2**30:,.1f} GiB more than "
            "this machine's memory: expected a smaller model, bfloat16 instead of float32, or weights held as they are "
            "stored"
        )


def _result_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    if name.endswith(".tid2eid"):
        return np.dtype(np.int32)
    return np.dtype(np.float32) if keeps_float32(name) else dtype


def _read_all(
    checkpoint: Checkpoint,
    matched: MatchedTensors,
    config: DSV4Config,
    held: Mapping[str, Held],
    experts: Container[int] | None,
    progress: Progress,
) -> Iterator[tuple[str, np.ndarray]]:
    done, total = 0, held_bytes(config, held)
    stacks: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    embedding: np.ndarray | None = None

    def empty(leading: tuple[int, ...], shape: tuple[int, ...], how: Held) -> tuple[np.ndarray, np.ndarray | None]:
        """For numbers, or for codes and scales."""
        if how.form is None:
            return np.empty((*leading, *shape), how.dtype), None
        rows, columns = shape
        codes = np.empty((*leading, rows, columns // (2 if how.form == "fp4" else 1)), np.uint8)
        return codes, np.empty((*leading, *scale_shape(how.form, (rows, columns))), np.uint8)

    for name, shape in expected_tensors(config).items():
        stored, how = matched.stored[name], held[name]
        if expert := _EXPERT.fullmatch(name):
            stack, index = f"{expert[1]}.{expert[3]}", int(expert[2])
            if stack not in stacks:
                stacks[stack] = empty((config.n_routed_experts,), shape, how)
            out, out_scale = (None if array is None else array[index] for array in stacks[stack])
        else:
            stack, index = "", 0
            out, out_scale = empty((), shape, how)
        assert out is not None
        if expert and experts is not None and index not in experts:
            pass  # others read it
        elif name in matched.forms:
            scales = matched.stored[scale_name(name)]
            try:
                if out_scale is None:
                    dequantise(matched.forms[name], checkpoint.read(stored), checkpoint.read(scales), out)
                else:
                    out_scale[...] = scale_bytes(matched.forms[name], checkpoint.read(scales))
                    out[...] = checkpoint.read(stored).view(np.uint8)
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
        done += _nbytes(shape, how)
        progress(done, total)
        if not stack:
            embedding = out if name == "embed.weight" and config.tie_word_embeddings else embedding
            yield name, out
            if out_scale is not None:
                yield scale_name(name), out_scale
        elif index == config.n_routed_experts - 1:
            out, out_scale = stacks.pop(stack)
            yield stack, out
            if out_scale is not None:
                yield f"{stack}_scale", out_scale
        del out, out_scale
    if embedding is not None:
        head = matched.stored.get("head.weight")
        if head is not None and not _same(checkpoint, head, matched.stored["embed.weight"]):
            raise ValueError(
                f"{checkpoint.path_of(head)}: {head} differs from the embedding: expected the "
                "same, as tie_word_embeddings is true"
            )
        yield "head.weight", embedding


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
