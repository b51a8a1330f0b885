"""A checkpoint's tensors beside those of a model: what agrees, what is missing, surplus, misshapen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsv4_jax.files.safetensors_file import Checkpoint, TensorInfo
from dsv4_jax.files.untrusted_json import shorten
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.tensor_names import (
    canonical_name,
    expected_tensors,
    is_draft,
    is_vision,
    least_tensors,
    scale_name,
)
from dsv4_jax.model.files.weight_formats import GROUP, form_of, scale_shape

_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I32", "I64")
#: U8 and I8 are E8M0 of writers that do not know the type.
_SCALES = ("F8_E8M0", "F32", "BF16", "U8", "I8")
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class MatchedTensors:
    """What a checkpoint holds, next to what the model needs.

    Attributes:
      stored: canonical name -> name in the checkpoint, for every tensor the model has and for the scales of those
        that are quantised.
      forms: canonical name -> "fp8" or "fp4", for every weight that is quantised.
      skipped: names in the checkpoint of tensors of draft (MTP) layers, which are not loaded.
      vision: names in the checkpoint of tensors of what reads pictures, which are not loaded either.
    """

    stored: Mapping[str, str]
    forms: Mapping[str, str]
    skipped: tuple[str, ...]
    vision: tuple[str, ...] = ()


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
    if len(checkpoint) < least_tensors(config):
        raise ValueError(
            f"{checkpoint.path}: holds {len(checkpoint)} tensors: expected more than {least_tensors(config)} "
            f"for {config.num_hidden_layers} layers of {config.n_routed_experts} experts"
        )
    model = expected_tensors(config)
    stored: dict[str, str] = {}
    skipped: list[str] = []
    vision: list[str] = []
    for name in (*checkpoint, *checkpoint.absent):
        canonical = canonical_name(name)
        if is_vision(canonical):
            vision.append(name)
        elif is_draft(canonical, config):
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
        MatchedTensors(stored, forms, tuple(skipped), tuple(vision)),
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
    if len(shape) != 2 or not canonical.endswith(".weight"):
        return None
    form = form_of(info.dtype, info.shape, (shape[0], shape[1]))
    return None if form == "fp4" and shape[1] % GROUP else form
