"""How the weights of a checkpoint are quantised, and whether that is a way this library reads.

Files say it twice: in words (`quantization_config` in config.json, `hf_quant_config.json`), and by the names, types
and shapes of their tensors. Words differ between writers of the same bits, so the tensors decide; words count where
they name something else, because small tensors look alike in several ways.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4_jax.files.safetensors_file import Checkpoint
from dsv4_jax.files.untrusted_json import read_json_object, shorten
from dsv4_jax.model.config import MAX_CONFIG_BYTES, DSV4Config
from dsv4_jax.model.files.tensor_names import (
    canonical_name,
    expected_tensors,
    is_draft,
    is_vision,
    least_tensors,
    scale_name,
)
from dsv4_jax.model.files.weight_formats import BLOCK, GROUP, form_of, scale_shape

EXPECTED = f"expected FP8 with a scale per {BLOCK}x{BLOCK} and FP4 with a scale per {GROUP}, as released"

#: Endings of tensors that only such weights have.
_TELLING = {
    r".*\.weight_scale_2": "NVFP4 (ModelOpt)",
    r".*\.weight_global_scale": "NVFP4 (compressed-tensors)",
    r".*\.weight_shape": "packed integers (compressed-tensors)",
    r".*\.weight_zero_point": "integers with zero points (compressed-tensors)",
    r".*\.(qweight|qzeros|g_idx)": "integers (AWQ or GPTQ)",
    r".*\.(SCB|weight_format)": "INT8 (bitsandbytes)",
    r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)": "4 bits (bitsandbytes)",
    r".*\.(scales|biases)": "integers in groups (MLX)",
    r".*_(blocks|scales)": "MXFP4 in blocks",
    r".*\.(input|output|q|k|v)_scale": "activations with fixed scales",
}
_INTEGERS = ("U16", "I16", "U32", "I32", "U64", "I64")
_PLAIN = ("F32", "F16", "BF16", "F64")
#: Words of config.json that may stand for the released bits; whether they do, the tensors say.
_METHODS = ("fp8", "mxfp4", "quark", "compressed-tensors", "modelopt")
_FORMATS = ("float-quantized", "mxfp4-pack-quantized", "mixed-precision")
_ALGORITHMS = ("MIXED_PRECISION", "FP8", "FP8_PB_WO", "MXFP4", "W4A8_MXFP4_FP8", "W4A16_MXFP4")
_FLOAT_TYPES = ("float", "fp4", "fp8_e4m3", "mxfp4", "fp8_e4m3fn")


def check_quantisation(checkpoint: Checkpoint, config: DSV4Config | None = None) -> None:
    """Refuses weights that are quantised in a way this library does not read, by what the files say of it.

    Args:
      checkpoint: its headers are looked at, no tensor; words are read from the JSON files of its folder.
      config: the model, for the shapes; without it names and types alone are judged.

    Raises:
      ValueError: with one sentence: which words or tensors show what, and what was expected.
    """
    shown = _by_name(checkpoint, config) or (_by_shape(checkpoint, config) if config is not None else None)
    quantised = any(
        checkpoint.info(name).dtype not in _PLAIN and canonical_name(name).endswith(".weight")
        for name in checkpoint
        if not _skipped(name, config)
    )
    words = next(_contradictions(checkpoint.path), None) if quantised or shown is not None else None
    if words is not None:
        tensors = f", and tensors such as {shown[0]} show {shown[1]}" if shown is not None else ""
        # What a single word was expected to be says more than the form as a whole.
        expected = EXPECTED if tensors else words[1]
        raise ValueError(f"{words[0]}{tensors}: {expected}")
    if shown is not None:
        said = next(_words(checkpoint.path), None)
        said = f"config.json says {shorten(said)}" if said is not None else "config.json does not say so"
        raise ValueError(
            f"{checkpoint.path}: weights are quantised as {shown[1]}, which tensors such as {shown[0]} show ({said}): "
            f"{EXPECTED}"
        )


def _skipped(name: str, config: DSV4Config | None) -> bool:
    canonical = canonical_name(name)
    return is_vision(canonical) or (config is not None and is_draft(canonical, config))


def _describe(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    return f"{shorten(name)} ({info.dtype} {list(info.shape)})"


def _by_name(checkpoint: Checkpoint, config: DSV4Config | None) -> tuple[str, str] | None:
    """A tensor that only other quantisations have, and which."""
    for pattern, label in _TELLING.items():
        tells = re.compile(pattern)
        for name in checkpoint:
            if tells.fullmatch(name) is not None and not _skipped(name, config):
                return _describe(checkpoint, name), label
    return None


def _by_shape(checkpoint: Checkpoint, config: DSV4Config) -> tuple[str, str] | None:
    """A weight whose type or scales show another quantisation, where most of that type do (not just one)."""
    names = {canonical_name(name): name for name in checkpoint if not _skipped(name, config)}
    found: dict[str, list[tuple[str, str]]] = {}
    quantised = Counter[str]()
    if len(checkpoint) < least_tensors(config):  # the configuration lies, perhaps: its tensors are not listed
        return None
    for canonical, shape in expected_tensors(config).items():
        if len(shape) != 2 or canonical not in names or not canonical.endswith(".weight"):
            continue
        info = checkpoint.info(names[canonical])
        if info.dtype in _PLAIN:
            continue
        quantised[info.dtype] += 1
        rows, columns = shape
        scales = names.get(scale_name(canonical))
        what = None
        form = form_of(info.dtype, info.shape, (rows, columns))
        if info.dtype in _INTEGERS:
            what = "packed integers"
        elif info.dtype == "F8_E5M2":
            what = "FP8 of the other kind (E5M2)"
        elif info.dtype == "I8" and info.shape == shape:
            what = "INT8"
        elif form is None or (form == "fp4" and columns % GROUP):
            continue
        elif scales is None:
            what = f"{form.upper()} without scales"
        elif (got := checkpoint.info(scales).shape) != scale_shape(form, (rows, columns)):
            what = f"{form.upper()} with {_per(got, (rows, columns))}"
        if what is not None:
            named = _describe(checkpoint, names[canonical])
            if scales is not None:
                named += f" with {_describe(checkpoint, scales)}"
            found.setdefault(info.dtype, []).append((named, what))
    for dtype, cases in found.items():
        if len(cases) > 1 and 2 * len(cases) > quantised[dtype]:
            return cases[0]
    return None


def _per(scales: tuple[int, ...], weight: tuple[int, int]) -> str:
    """What one of these scales stands for."""
    if len(scales) < 2 and scales in ((), (1,)):
        return "one scale per tensor"
    if scales in ((weight[0],), (weight[0], 1)):
        return "a scale per row"
    if len(scales) == 2 and all(scales):
        rows, columns = (-(-n // s) for n, s in zip(weight, scales, strict=True))
        return f"a scale per {columns}" if rows == 1 else f"a scale per {rows}x{columns}"
    return f"scales of shape {list(scales)}"


def _configs(folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects that say how weights are quantised, with where they stand."""
    for file, keys in (
        ("config.json", ("quantization_config", "compression_config")),
        ("hf_quant_config.json", ("quantization",)),
    ):
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            continue
        raw = read_json_object(path, max_bytes=MAX_CONFIG_BYTES)
        nested = raw.get("text_config")
        for owner in (raw, nested if isinstance(nested, Mapping) else {}):
            for key in keys:
                if isinstance(owner.get(key), Mapping):
                    yield f"{path}: {key}", owner[key]


def _words(folder: str) -> Iterator[str]:
    for _, words in _configs(folder):
        for key in ("quant_method", "quant_algo"):
            if isinstance(words.get(key), str):
                yield words[key]


def _contradictions(folder: str) -> Iterator[tuple[str, str]]:
    """Words that stand for other bits than the released ones, each with what was expected there."""
    for where, words in _configs(folder):
        for key, allowed in (("quant_method", _METHODS), ("format", _FORMATS), ("fmt", ("e4m3", "float8_e4m3fn"))):
            if words.get(key) is not None and words[key] not in allowed:
                yield f"{where}.{key} is {shorten(words[key])}", f"expected {' or '.join(map(repr, allowed))}"
        size = words.get("weight_block_size")
        if size is not None and size != [BLOCK, BLOCK]:
            yield f"{where}.weight_block_size is {shorten(size)}", f"expected {[BLOCK, BLOCK]}"
        for key, value in words.items():
            if (
                key.endswith("quant_algo")
                and not key.startswith("kv_cache")
                and value is not None
                and value not in _ALGORITHMS
            ):
                yield f"{where}.{key} is {shorten(value)}", EXPECTED
        for key, value in _weight_schemes(words, 0):
            problem = _other_scheme(value)
            if problem is not None:
                yield f"{where}.{key}.{problem[0]} is {shorten(problem[1])}", EXPECTED


def _weight_schemes(words: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is said of weights (not of activations), however deep; Quark calls it "weight"."""
    for key, value in words.items():
        if isinstance(value, Mapping) and depth < 8:
            if key in ("weight", "weights"):
                yield key, value
            else:
                yield from ((f"{shorten(key, 40)[1:-1]}.{k}", v) for k, v in _weight_schemes(value, depth + 1))


def _other_scheme(scheme: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The entry of a scheme that no released bits have."""
    for key in ("type", "dtype"):
        if scheme.get(key) is not None and scheme[key] not in _FLOAT_TYPES:
            return key, scheme[key]
    bits = scheme.get("num_bits")
    if bits not in (None, 4, 8):
        return "num_bits", bits
    if scheme.get("group_size") not in (None, GROUP, BLOCK):
        return "group_size", scheme["group_size"]
    if scheme.get("block_structure") not in (None, [BLOCK, BLOCK]):
        return "block_structure", scheme["block_structure"]
    if scheme.get("strategy") not in (None, "group", "block", "tensor_group"):
        return "strategy", scheme["strategy"]
    return None
