"""The three ways files write a DeepSeek-V4 configuration, turned into one.

Each field of `DSV4Config` carries the check its value must pass and the other names files give
it; this module finds the values, wherever the form keeps them, and makes sure that what a file
says twice agrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv4_jax.files.untrusted_json import shorten
from dsv4_jax.model.field_checks import KNOWN_RATIOS, only, real, sequence

# What the model computes without asking; a file that says otherwise describes another model.
_FIXED = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "topk_method": ("noaux_tc",),
}
_SWA_TYPE, *_COMPRESSED_TYPES = KNOWN_RATIOS.values()
# layer_types with entries -> field of DSV4Config with their ratio.
_RATIO_FIELD = dict(zip(_COMPRESSED_TYPES, ("csa_ratio", "hca_ratio"), strict=True))
# Keys of a YaRN block -> fields of DSV4Config.
_YARN = {
    "factor": "rope_factor",
    "original_max_position_embeddings": "rope_original_max_position",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
}
# What stands for a field without being a key of its own.
_ELSEWHERE = {
    "compress_ratios": ("layer_types",),
    "num_hash_layers": ("mlp_layer_types",),
    **{field: (f"rope_scaling.{key}", f"rope_parameters.compress.{key}") for key, field in _YARN.items()},
}


class _Found:
    """Values by field, each remembered with the name the file gave it."""

    def __init__(self, fields: Mapping[str, dataclasses.Field[Any]]) -> None:
        self._fields = fields
        self._values: dict[str, tuple[str, Any]] = {}

    def add(self, field: str, source: str, value: Any) -> None:
        value = self._fields[field].metadata["check"](source, value)
        first_source, first = self._values.setdefault(field, (source, value))
        if first != value:
            raise ValueError(
                f"{first_source} says {shorten(first)} but {source} says {shorten(value)}: expected them to agree"
            )

    def __contains__(self, field: str) -> bool:
        return field in self._values

    def add_if_missing(self, field: str, source: str, value: Any) -> None:
        if field not in self._values:
            self.add(field, source, value)

    def get(self, field: str) -> Any:
        """The value of a field, or its default; ValueError if it has neither."""
        if field in self._values:
            return self._values[field][1]
        declared = self._fields[field]
        if declared.default is not dataclasses.MISSING:
            return declared.default
        names = " or ".join((*_ELSEWHERE.get(field, ()), *declared.metadata["names"], field))
        raise ValueError(f"{field} is missing: expected the key {names}")


def gather(raw: Mapping[str, Any], fields: tuple[dataclasses.Field[Any], ...]) -> dict[str, Any]:
    """The constructor arguments of `DSV4Config` that the parsed file `raw` stands for.

    Raises:
      ValueError: a field missing, refused by its check, or given twice with different values.
    """
    raw = _text_part(raw)
    for key, allowed in _FIXED.items():
        if raw.get(key) is not None:
            only(*allowed)(key, raw[key])
    by_name = {field.name: field for field in fields}
    found = _Found(by_name)

    def read(name: str) -> None:
        for key in (*by_name[name].metadata["names"], name):
            value = raw.get(key)
            if name == "compress_ratios" and value is not None:
                value = _first_layers(key, value, found.get("num_hidden_layers"))
            # null stands for "not given", except where a model may really have no such token.
            if value is not None or (key in raw and name.endswith("_token_id")):
                found.add(name, key, value)

    read("num_hidden_layers")
    for name in by_name:
        read(name)
    _read_layer_types(raw, found)
    _infer_ratios(found)
    _read_rope(raw, found)
    return {name: found.get(name) for name in by_name}


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of the file of a model that also reads pictures; all of any other file."""
    if raw.get("num_hidden_layers") is None and raw.get("n_layers") is None:
        for key in ("text_config", "language_config", "llm_config"):
            if isinstance(raw.get(key), Mapping):
                return raw[key]
    return raw


def _infer_ratios(found: _Found) -> None:
    """The two ratios where a file has them per layer only: with two of them, CSA's is the smaller."""
    missing = [field for field in _RATIO_FIELD.values() if field not in found]
    if not missing or "compress_ratios" not in found:
        return
    used = sorted({ratio for ratio in found.get("compress_ratios") if ratio})
    if set(used) <= {found.get(field) for field in _RATIO_FIELD.values()}:
        return
    if len(used) == 2 and len(missing) == 2:
        for field, ratio in zip(_RATIO_FIELD.values(), used, strict=True):
            found.add(field, "compress_ratios", ratio)
    elif len(used) == 2 and found.get(given := (set(_RATIO_FIELD.values()) - set(missing)).pop()) in used:
        found.add(missing[0], "compress_ratios", used[1 - used.index(found.get(given))])


def _first_layers(name: str, value: Any, layers: int) -> tuple[Any, ...]:
    """The first `layers` entries of a per-layer list; what follows belongs to draft layers."""
    entries = sequence(name, value)
    if len(entries) < layers:
        raise ValueError(f"{name} has {len(entries)} entries: expected at least num_hidden_layers = {layers}")
    return entries[:layers]


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shorten(value)}: expected an object")
    return value


def _read_layer_types(raw: Mapping[str, Any], found: _Found) -> None:
    """The Hugging Face form: layer_types with compress_rates, and mlp_layer_types."""
    layers = found.get("num_hidden_layers")
    for name, rate in _object("compress_rates", raw.get("compress_rates")).items():
        if name in _RATIO_FIELD:
            found.add(_RATIO_FIELD[name], f"compress_rates.{name}", rate)
        elif name == _SWA_TYPE:
            only(0)(f"compress_rates.{name}", rate)
        else:
            raise ValueError(f"compress_rates has {shorten(name)}: expected only {', '.join(KNOWN_RATIOS.values())}")
    if raw.get("layer_types") is not None:
        types = _first_layers("layer_types", raw["layer_types"], layers)
        for layer, name in enumerate(types):
            only(_SWA_TYPE, *_RATIO_FIELD)(f"layer_types[{layer}]", name)
        ratios = tuple(0 if name == _SWA_TYPE else found.get(_RATIO_FIELD[name]) for name in types)
        found.add("compress_ratios", "layer_types", ratios)
    if raw.get("mlp_layer_types") is not None:
        types = _first_layers("mlp_layer_types", raw["mlp_layer_types"], layers)
        for layer, name in enumerate(types):
            only("hash_moe", "moe")(f"mlp_layer_types[{layer}]", name)
        hashed = types.count("hash_moe")
        if "hash_moe" in types[hashed:]:
            raise ValueError("mlp_layer_types has hash_moe after moe: expected the hash_moe layers first")
        found.add("num_hash_layers", "mlp_layer_types", hashed)


def _read_rope(raw: Mapping[str, Any], found: _Found) -> None:
    """RoPE, wherever the form keeps it.

    `rope_scaling` (released) and a flat `rope_parameters` hold YaRN and perhaps the base of SWA
    layers; a nested `rope_parameters` holds a block for SWA layers (`main`) and one for CSA and
    HCA layers (`compress`).
    """
    _read_rope_dim("partial_rotary_factor", raw.get("partial_rotary_factor"), found)
    for key in ("rope_scaling", "rope_parameters"):
        block = _object(key, raw.get(key))
        if "main" in block or "compress" in block:
            main = _object(f"{key}.main", block.get("main"))
            _rope_type(f"{key}.main", main, "default")
            _read_rope_block(f"{key}.main", main, "rope_theta", found)
            compress = _object(f"{key}.compress", block.get("compress"))
            _read_rope_block(f"{key}.compress", compress, "compress_rope_theta", found)
            _read_yarn(f"{key}.compress", compress, found)
        else:
            _read_rope_block(key, block, "rope_theta", found)
            _read_yarn(key, block, found)


def _read_rope_block(name: str, block: Mapping[str, Any], theta: str, found: _Found) -> None:
    if block.get("rope_theta") is not None:
        found.add(theta, f"{name}.rope_theta", block["rope_theta"])
    _read_rope_dim(f"{name}.partial_rotary_factor", block.get("partial_rotary_factor"), found)


def _read_rope_dim(name: str, fraction: Any, found: _Found) -> None:
    """rope_dim given as a fraction of head_dim."""
    if fraction is not None:
        size = real(0, 1)(name, fraction) * found.get("head_dim")
        if size != round(size):
            raise ValueError(
                f"{name} is {shorten(fraction)}: expected a whole number of values of head_dim = "
                f"{found.get('head_dim')}"
            )
        found.add("rope_dim", f"{name} * head_dim", round(size))


def _rope_type(name: str, block: Mapping[str, Any], *allowed: str) -> str | None:
    kind = None
    for key in ("type", "rope_type"):
        if block.get(key) is not None:
            kind = only(*allowed)(f"{name}.{key}", block[key])
    return kind


def _read_yarn(name: str, block: Mapping[str, Any], found: _Found) -> None:
    if _rope_type(name, block, "yarn", "default") == "default":
        # No scaling: a factor of 1, for which the other numbers do not matter.
        found.add("rope_factor", f"{name}.rope_type 'default'", 1)
        found.add_if_missing(
            "rope_original_max_position",
            "max_position_embeddings",
            found.get("max_position_embeddings"),
        )
        return
    for key, field in _YARN.items():
        if block.get(key) is not None:
            found.add(field, f"{name}.{key}", block[key])
    # This model's YaRN has no factor on the magnitudes.
    factor = block.get("attention_factor")
    if factor is not None and real(0, 1e6)(f"{name}.attention_factor", factor) != 1:
        raise ValueError(f"{name}.attention_factor is {shorten(factor)}: expected 1")
