"""The tensors of a model: their names in files, and their shapes.

Files name tensors in two ways, Hugging Face's (`model.layers.0…`, `model.embed_tokens.weight`) and the release's
(`layers.0…`, `embed.weight`). Inside this library there is one, the canonical name: the release's, with the head of the
residual streams as `hc_head.hc_fn`, `hc_head.hc_base` and `hc_head.hc_scale` and the norm of key-value records as
`attn.norm.weight`.
"""

from __future__ import annotations

import re

from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.layer_schedule import AttentionType, LayerSpec, RouterMode, build_schedule

_RENAMED = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
_ENDINGS = {
    ".attn.kv_norm.weight": ".attn.norm.weight",
    ".weight_scale_inv": ".scale",
    ".weight_scale": ".scale",
    ".weight_packed": ".weight",
}
#: What stands before the names of a model, and before those of a text model beside a vision tower.
_PREFIXES = ("model.", "language_model.", "language.", "model.")
_VISION = re.compile(
    r"(vision|visual|vision_(tower|model|encoder)|aligner|((multi_modal|mm)_)?projector|image_[a-z_]+|"
    r"view_sep[ae]rator|audio_tower)(\..*)?|.*\.ffn\.gate\.bias_vl"
)
_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_FLOAT32 = re.compile(r"(^|.*[._])norm\.weight|.*\.?hc_[a-z_]+|.*\.(attn_sink|ape)|.*\.gate\.bias(_vl)?")
_DIVIDED = {
    "experts": re.compile(r"layers\.\d+\.ffn\.experts\.(\d+\.)?w[123](\.weight|\.scale|_scale)?"),
    "rows": re.compile(
        r"layers\.\d+\.(attn\.attn_sink|(attn\.(wq_b|wo_a)|ffn\.shared_experts\.w[13])\.(weight|scale))"
    ),
    "columns": re.compile(r"layers\.\d+\.(attn\.wo_b|ffn\.shared_experts\.w2)\.(weight|scale)"),
}


def canonical_name(name: str) -> str:
    """The canonical name of a tensor, from either form.

    `model.layers.0.attn.wq_a.weight` -> `layers.0.attn.wq_a.weight`,
    `model.embed_tokens.weight` -> `embed.weight`,
    `layers.0.attn.kv_norm.weight` -> `layers.0.attn.norm.weight`.
    The scales of a weight are its name with `.scale`, in files also `.weight_scale_inv` or `.weight_scale`.
    """
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for ending, canonical in _ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + canonical
    return _RENAMED.get(name, name)


def released_name(canonical: str) -> str:
    """The name a release gives the tensor with this canonical name."""
    return canonical.replace("hc_head.hc_", "hc_head_").replace(".attn.norm.weight", ".attn.kv_norm.weight")


def scale_name(weight: str) -> str:
    """Canonical name of the scales of the weight with this canonical name."""
    return weight.removesuffix(".weight") + ".scale"


def is_draft(name: str, config: DSV4Config) -> bool:
    """Whether the tensor with this canonical name belongs to a draft (multi-token prediction) layer."""
    layer = _LAYER.match(name)
    beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return beyond or name.startswith("mtp.")


def is_vision(name: str) -> bool:
    """Whether the tensor with this canonical name belongs to what reads pictures, which text needs not."""
    return _VISION.fullmatch(name) is not None


def is_skipped(name: str, config: DSV4Config) -> bool:
    """Whether a checkpoint's tensor of this name, as files have it, is no part of the model that makes text."""
    canonical = canonical_name(name)
    return is_draft(canonical, config) or is_vision(canonical)


def keeps_float32(name: str) -> bool:
    """Whether the tensor with this canonical name stays float32 whatever type the model computes
    in: norms, the residual streams' weights (hc_*), sinks, ape, the router's bias."""
    return _FLOAT32.fullmatch(name) is not None


def divided_by(name: str) -> str | None:
    """By what a mesh divides a weight: "experts" among all devices, "rows" or "columns" along an axis "model".

    Rows are the heads of wq_b and attn_sink, their groups in wo_a and inner values of the shared expert; wo_b and w2
    take these as columns. name: canonical, a checkpoint's or an array's of the model. None: every device has it whole.
    """
    return next((how for how, names in _DIVIDED.items() if names.fullmatch(name)), None)


def device_share(nbytes: int, name: str, devices: int, model_devices: int) -> int:
    """Bytes of a weight on one of so many devices, of which model_devices lie along an axis "model"."""
    parts = {"experts": devices, None: 1}.get(divided_by(name), model_devices)
    return -(-nbytes // parts)


def check_division(name: str, shape: tuple[int, ...], model_devices: int) -> None:
    """ValueError where so many devices along an axis "model" do not divide the axis of an array that lies along it."""
    axis = {"rows": 0, "columns": 1}.get(divided_by(name) or "")
    if axis is not None and shape[axis] % model_devices:
        raise ValueError(
            f'{name} has shape {shape}: the mesh has {model_devices} devices along "model", expected a number that '
            f"divides {shape[axis]}"
        )


def least_tensors(config: DSV4Config) -> int:
    """Fewer tensors than this no checkpoint of the model has: its experts alone are as many."""
    return config.num_hidden_layers * config.n_routed_experts * 3


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
