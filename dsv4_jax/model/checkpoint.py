"""From a checkpoint's files to the arrays of a model: names, shapes, types.

Two forms of names exist: Hugging Face's (`model.layers.0…`, `model.embed_tokens.weight`) and the
release's (`layers.0…`, `embed.weight`). Inside this library there is one, the canonical name: the
release's, with the head of the residual streams as `hc_head.hc_fn`, `hc_head.hc_base` and
`hc_head.hc_scale`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.layer_schedule import AttentionType, LayerSpec, RouterMode, build_schedule
from dsv4_jax.model.safetensors_file import Checkpoint, open_checkpoint
from dsv4_jax.model.untrusted_json import shorten

_log = logging.getLogger(__name__)

_RENAMED = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_FLOAT32 = re.compile(r"(^|.*[._])norm\.weight|.*\.?hc_[a-z_]+|.*\.(attn_sink|ape)|.*\.gate\.bias")
_FLOATS = ("F32", "F16", "BF16")
_INTEGERS = ("I32", "I64")
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_SHOWN = 5


def canonical_name(name: str) -> str:
    """The canonical name of a tensor, from either form.

    `model.layers.0.attn.wq_a.weight` -> `layers.0.attn.wq_a.weight`,
    `model.embed_tokens.weight` -> `embed.weight`.
    """
    name = name.removeprefix("model.")
    return _RENAMED.get(name, name)


def keeps_float32(name: str) -> bool:
    """Whether the tensor with this canonical name stays float32 whatever type the model computes
    in: norms, the residual streams' weights (hc_*), sinks, ape, the router's bias."""
    return _FLOAT32.fullmatch(name) is not None


def expected_tensors(config: DSV4Config) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor a checkpoint of this model holds.

    Linear weights are (out, in). Experts are separate, as files have them. `head.weight` is
    absent where the embedding is the head.
    """
    streams, hidden = config.hc_mult, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "hc_head.hc_fn": (streams, streams * hidden),
        "hc_head.hc_base": (streams,),
        "hc_head.hc_scale": (1,),
    }
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, hidden)
    for spec in build_schedule(config):
        layer = _layer_shapes(config, spec)
        shapes |= {f"layers.{spec.layer_idx}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: DSV4Config, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, streams = config.num_attention_heads, config.hc_mult
    outputs = config.o_groups * config.o_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn.wq_a.weight": (config.q_lora_rank, hidden),
        "attn.q_norm.weight": (config.q_lora_rank,),
        "attn.wq_b.weight": (heads * head_dim, config.q_lora_rank),
        "attn.wkv.weight": (head_dim, hidden),
        "attn.norm.weight": (head_dim,),
        "attn.attn_sink": (heads,),
        "attn.wo_a.weight": (outputs, heads // config.o_groups * head_dim),
        "attn.wo_b.weight": (hidden, outputs),
    }
    for part in ("attn", "ffn"):
        mixes = streams * (2 + streams)  # pre, post and comb
        shapes[f"hc_{part}_fn"] = (mixes, streams * hidden)
        shapes[f"hc_{part}_base"] = (mixes,)
        shapes[f"hc_{part}_scale"] = (3,)

    def compressor(name: str, width: int) -> None:
        lanes = 2 if spec.attn is AttentionType.CSA else 1  # CSA's windows overlap
        shapes[f"{name}.wkv.weight"] = (lanes * width, hidden)
        shapes[f"{name}.wgate.weight"] = (lanes * width, hidden)
        shapes[f"{name}.norm.weight"] = (width,)
        shapes[f"{name}.ape"] = (spec.compress_ratio, lanes * width)

    if spec.attn is not AttentionType.SWA:
        compressor("attn.compressor", head_dim)
    if spec.attn is AttentionType.CSA:
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        shapes["attn.indexer.wq_b.weight"] = (index_heads * index_dim, config.q_lora_rank)
        shapes["attn.indexer.weights_proj.weight"] = (index_heads, hidden)
        compressor("attn.indexer.compressor", index_dim)

    experts, width = config.n_routed_experts, config.moe_intermediate_size
    shapes["ffn.gate.weight"] = (experts, hidden)
    if spec.router_mode is RouterMode.HASH:
        shapes["ffn.gate.tid2eid"] = (config.vocab_size, config.num_experts_per_tok)
    else:
        shapes["ffn.gate.bias"] = (experts,)
    for expert in (*(f"experts.{e}" for e in range(experts)), "shared_experts"):
        shapes[f"ffn.{expert}.w1.weight"] = (width, hidden)
        shapes[f"ffn.{expert}.w2.weight"] = (hidden, width)
        shapes[f"ffn.{expert}.w3.weight"] = (width, hidden)
    return shapes


@dataclasses.dataclass(frozen=True)
class MatchedTensors:
    """What a checkpoint holds, next to what the model needs.

    Attributes:
      stored: canonical name -> name in the checkpoint, for every tensor the model has.
      skipped: names in the checkpoint of tensors of draft (MTP) layers, which are not loaded.
    """

    stored: Mapping[str, str]
    skipped: tuple[str, ...]


def match_tensors(checkpoint: Checkpoint, config: DSV4Config) -> MatchedTensors:
    """Compares a checkpoint's headers with what `config` needs; reads no tensor.

    Raises:
      ValueError: tensors stored in a type that is not supported, missing, surplus or misshapen
        (the first few are named, and how many), or one tensor under two names.
    """
    # Before the expected names are listed: the configuration may be the one that lies.
    at_least = config.num_hidden_layers * config.n_routed_experts * 3
    if len(checkpoint) < at_least:
        raise ValueError(
            f"{checkpoint.path}: holds {len(checkpoint)} tensors: expected more than {at_least} "
            f"for {config.num_hidden_layers} layers of {config.n_routed_experts} experts"
        )
    expected = expected_tensors(config)
    stored: dict[str, str] = {}
    skipped: list[str] = []
    for name in checkpoint:
        canonical = canonical_name(name)
        if _is_draft(canonical, config):
            skipped.append(name)
        elif stored.setdefault(canonical, name) != name:
            raise ValueError(
                f"{checkpoint.path_of(name)}: {shorten(name)} and {shorten(stored[canonical])} "
                "are names of the same tensor: expected one of them"
            )

    def complain(problem: str, names: list[str], hint: str) -> None:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(f"{checkpoint.path}: {len(names)} {problem}: {', '.join(names[:_SHOWN])}{more}; {hint}")

    unsupported = []
    for canonical, name in stored.items():
        dtype = checkpoint.info(name).dtype
        if canonical in expected and dtype not in _dtypes_of(canonical):
            unsupported.append(f"{shorten(name)} ({dtype})")
    complain(
        "tensors are stored in a type that is not supported",
        unsupported,
        f"expected {', '.join(_FLOATS)}, and {' or '.join(_INTEGERS)} for tid2eid",
    )
    complain(
        "tensors are missing",
        [name for name in expected if name not in stored],
        "expected those that config.json implies",
    )
    tied_head = {"head.weight"} if config.tie_word_embeddings else set()
    surplus = [shorten(n) for c, n in stored.items() if c not in expected and c not in tied_head]
    complain("tensors are surplus", surplus, "expected those that config.json implies")
    misshapen = []
    for canonical, shape in expected.items():
        got = checkpoint.info(stored[canonical]).shape
        if got != shape:
            misshapen.append(f"{stored[canonical]} is {got} instead of {shape}")
    complain("tensors are misshapen", misshapen, "expected the shapes config.json implies")
    return MatchedTensors(stored, tuple(skipped))


def _is_draft(canonical: str, config: DSV4Config) -> bool:
    layer = _LAYER.match(canonical)
    beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return beyond or canonical.startswith("mtp.")


def _dtypes_of(canonical: str) -> tuple[str, ...]:
    return _INTEGERS if canonical.endswith(".tid2eid") else _FLOATS


def load_tensors(
    path: str | os.PathLike[str],
    config: DSV4Config | None = None,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """Loads a checkpoint's tensors.

    Everything is checked before memory is taken; then one tensor at a time is read from the
    mapped file and cast, so that the peak is near the size of the result.

    Args:
      path: the checkpoint's folder, as for `open_checkpoint`.
      config: the model; None reads the folder's `config.json`.
      dtype: float32 or bfloat16, for the weights. Norms, hc_*, attn_sink, ape and the router's
        bias stay float32; tid2eid becomes int32.

    Returns:
      Canonical name -> array of its own memory. Linear weights are (out, in) as stored. The
      experts of a layer are stacked: `layers.N.ffn.experts.w1` and `.w3` are (experts,
      moe_intermediate_size, hidden_size), `.w2` is (experts, hidden_size, moe_intermediate_size).
      `head.weight` is the embedding itself where the configuration ties them.

    Raises:
      FileNotFoundError: no checkpoint, no config.json, or a shard missing.
      ValueError: files that `open_checkpoint` refuses, tensors that `match_tensors` refuses, a
        tid2eid that names experts the model does not have, or an unknown dtype.
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
    if matched.skipped:
        _log.info("skipped %d tensors of draft layers", len(matched.skipped))
    return _read_all(checkpoint, matched.stored, config, dtype)


def _read_all(
    checkpoint: Checkpoint, stored: Mapping[str, str], config: DSV4Config, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, shape in expected_tensors(config).items():
        raw = checkpoint.read(stored[name])
        if expert := _EXPERT.fullmatch(name):
            stack = f"{expert[1]}.{expert[3]}"
            if stack not in tensors:
                tensors[stack] = np.empty((config.n_routed_experts, *shape), dtype)
            tensors[stack][int(expert[2])] = raw
        elif name.endswith(".tid2eid"):
            tensors[name] = _expert_table(raw, config, checkpoint.path_of(stored[name]), name)
        else:
            tensors[name] = raw.astype(np.float32 if keeps_float32(name) else dtype)
    if config.tie_word_embeddings:
        head = stored.get("head.weight")
        if head is not None and not _same(checkpoint, head, stored["embed.weight"]):
            raise ValueError(
                f"{checkpoint.path_of(head)}: {head} differs from the embedding: expected the "
                "same, as tie_word_embeddings is true"
            )
        tensors["head.weight"] = tensors["embed.weight"]
    return tensors


def _same(checkpoint: Checkpoint, left: str, right: str) -> bool:
    a, b = checkpoint.read(left), checkpoint.read(right)
    return a.shape == b.shape and bool(np.array_equal(a.astype(np.float32), b.astype(np.float32)))


def _expert_table(raw: np.ndarray, config: DSV4Config, path: str, name: str) -> np.ndarray:
    experts = config.n_routed_experts
    outside = (raw < 0) | (raw >= experts)
    if outside.any():
        token, pick = np.argwhere(outside)[0]
        raise ValueError(
            f"{path}: {name}[{token}, {pick}] is {raw[token, pick]}: expected an expert from 0 to {experts - 1}"
        )
    return raw.astype(np.int32)
