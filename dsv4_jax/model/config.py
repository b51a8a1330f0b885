"""The configuration of a DeepSeek-V4 model.

`DSV4Config` has one name per quantity. Files name them in three ways (the released
`config.json`, the Hugging Face form, and the keys of the release's own inference code);
`DSV4Config.from_hf` reads all three and refuses what contradicts itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from dsv4_jax.cache.geometry import CacheGeometry
from dsv4_jax.files.untrusted_json import read_json_object, shorten
from dsv4_jax.model.config_forms import gather
from dsv4_jax.model.field_checks import (
    KNOWN_RATIOS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_RATIO,
    MAX_VOCAB,
    boolean,
    integer,
    only,
    ratios,
    real,
    token_id,
    token_ids,
)
from dsv4_jax.model.layer_schedule import LayerSpec, build_schedule

__all__ = ["KNOWN_RATIOS", "SCORING_FUNCS", "DSV4Config"]

#: Router scores this library computes: sqrt(softplus(x)).
SCORING_FUNCS = ("sqrtsoftplus",)

MAX_CONFIG_BYTES = 1 << 20
_dim = integer(1, 1 << 20)


def _field(check: Callable[[str, Any], Any], *names: str, **default: Any) -> Any:
    """A field, the check its value must pass, and the other names files give it."""
    return dataclasses.field(metadata={"check": check, "names": names}, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSV4Config:
    """Everything about a DeepSeek-V4 model that shapes follow from. Frozen and hashable.

    Section numbers are those of the technical report, arXiv 2606.19348. Dimensions are counts of
    values, windows and positions counts of tokens.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: width of one residual stream.
      num_hidden_layers: layers, draft (MTP) layers not counted.
      compress_ratios: per layer, tokens per compressed entry: 0 = sliding window only (SWA),
        `csa_ratio` = compressed sparse attention (CSA), `hca_ratio` = heavily compressed attention
        (HCA). Exactly `num_hidden_layers` long.
      csa_ratio, hca_ratio: these two ratios (section 2.3); 4 and 128 in the released models.
      sliding_window: tokens every layer sees uncompressed, the query's own included.
      max_position_embeddings: positions the model was made for.
      num_attention_heads: query heads; there is one key-value head.
      head_dim: width of a head and of a KV record, `rope_dim` included (section 2.3).
      rope_dim: the last values of a head that RoPE rotates.
      q_lora_rank: width of the query's low-rank bottleneck.
      o_lora_rank: width per group of the grouped output projection (section 2.3.1).
      o_groups: groups of that projection; they divide the heads.
      index_n_heads: query heads of the lightning indexer (section 2.3.1).
      index_head_dim: their width; the last `rope_dim` values are rotated.
      index_topk: compressed entries a CSA query attends to.
      rope_theta: RoPE base of SWA layers, without scaling.
      compress_rope_theta: RoPE base of CSA and HCA layers, scaled by YaRN:
      rope_factor: YaRN's factor (1 = no scaling);
      rope_original_max_position: positions before scaling;
      rope_beta_fast, rope_beta_slow: rotations at which the ramp begins and ends.
      hc_mult: residual streams (manifold-constrained hyper-connections, section 2.2).
      hc_sinkhorn_iters: Sinkhorn iterations of their mixing matrix.
      hc_eps: the epsilon in these divisions.
      n_routed_experts: experts a router chooses among, per layer.
      n_shared_experts: experts every token passes through; 1.
      num_experts_per_tok: experts chosen per token.
      moe_intermediate_size: width inside an expert.
      num_hash_layers: the first layers, whose experts follow from the token id by a table.
      routed_scaling_factor: factor on the weights of the chosen experts.
      swiglu_limit: bound on an expert's activations before SwiGLU.
      scoring_func: what turns router logits into scores; "sqrtsoftplus".
      norm_topk_prob: the weights of the chosen experts are normalised to sum 1; True.
      rms_norm_eps: the epsilon of every RMS norm.
      bos_token_id: the token a text begins with, or None.
      eos_token_id: the token (or tokens) a text ends with, or None; see `eos_token_ids`.
      tie_word_embeddings: the output head is the embedding.

    Raises:
      ValueError: on construction, for a value of the wrong type or outside its range, and for
        values that contradict each other; it names the field, what it got and what it expected.
    """

    vocab_size: int = _field(integer(1, MAX_VOCAB))
    hidden_size: int = _field(_dim, "dim")
    num_hidden_layers: int = _field(integer(1, MAX_LAYERS), "n_layers")
    compress_ratios: tuple[int, ...] = _field(ratios)
    csa_ratio: int = _field(integer(2, MAX_RATIO), default=4)
    hca_ratio: int = _field(integer(2, MAX_RATIO), default=128)
    sliding_window: int = _field(_dim, "window_size")
    max_position_embeddings: int = _field(integer(1, MAX_POSITION), "max_seq_len", default=1 << 20)

    num_attention_heads: int = _field(integer(1, 65536), "n_heads")
    head_dim: int = _field(integer(2, 65536))
    rope_dim: int = _field(integer(2, 65536), "qk_rope_head_dim", "rope_head_dim")
    q_lora_rank: int = _field(_dim)
    o_lora_rank: int = _field(_dim)
    o_groups: int = _field(integer(1, 65536))
    index_n_heads: int = _field(integer(1, 65536))
    index_head_dim: int = _field(integer(2, 65536))
    index_topk: int = _field(integer(1, MAX_POSITION))

    rope_theta: float = _field(real(1.5, 1e15))
    compress_rope_theta: float = _field(real(1.5, 1e15))
    rope_factor: float = _field(real(1, 1e6))
    rope_original_max_position: int = _field(integer(1, MAX_POSITION), "original_seq_len")
    rope_beta_fast: float = _field(real(1e-3, 1e6), "beta_fast", default=32.0)
    rope_beta_slow: float = _field(real(1e-3, 1e6), "beta_slow", default=1.0)

    hc_mult: int = _field(integer(1, 64))
    hc_sinkhorn_iters: int = _field(integer(1, 1000))
    hc_eps: float = _field(real(1e-30, 0.1), default=1e-6)

    n_routed_experts: int = _field(integer(1, 65536), "num_local_experts")
    n_shared_experts: int = _field(only(1))
    num_experts_per_tok: int = _field(integer(1, 1024), "n_activated_experts")
    moe_intermediate_size: int = _field(_dim, "moe_inter_dim")
    num_hash_layers: int = _field(integer(0, MAX_LAYERS), "n_hash_layers")
    routed_scaling_factor: float = _field(real(1e-6, 1e6), "route_scale")
    swiglu_limit: float = _field(real(1e-6, 1e30))
    scoring_func: str = _field(only(*SCORING_FUNCS), "score_func", default=SCORING_FUNCS[0])
    norm_topk_prob: bool = _field(only(True), default=True)

    rms_norm_eps: float = _field(real(1e-30, 0.1), "norm_eps", default=1e-6)
    bos_token_id: int | None = _field(token_id, default=0)
    eos_token_id: int | tuple[int, ...] | None = _field(token_ids, default=1)
    tie_word_embeddings: bool = _field(boolean, default=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["check"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check_agreement()

    def _check_agreement(self) -> None:
        """The rules between fields."""
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries: expected exactly "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.csa_ratio == self.hca_ratio:
            raise ValueError(
                f"csa_ratio and hca_ratio are both {self.csa_ratio}: expected two ratios, which tell the layers apart"
            )
        if self.block_size > MAX_RATIO:
            raise ValueError(
                f"csa_ratio is {self.csa_ratio} and hca_ratio {self.hca_ratio}: expected ratios whose least common "
                f"multiple, the tokens of a block, is at most {MAX_RATIO}"
            )
        for layer, ratio in enumerate(self.compress_ratios):
            if ratio not in self.attention_of_ratio:
                known = ", ".join(str(r) for r in self.attention_of_ratio)
                raise ValueError(
                    f"compress_ratios[{layer}] is {shorten(ratio)}: expected one of the known ratios {known}; the keys "
                    "csa_ratio and hca_ratio name others"
                )
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}: expected an even number, RoPE is pairs")
        # A record keeps at least one value without position beside those that RoPE rotates.
        for name, most in (
            ("head_dim", self.head_dim - 1),
            ("index_head_dim", self.index_head_dim),
        ):
            if self.rope_dim > most:
                raise ValueError(
                    f"rope_dim is {self.rope_dim}: expected at most {most}, as {name} is {getattr(self, name)}"
                )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"o_groups is {self.o_groups}: expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: expected at most "
                f"n_routed_experts = {self.n_routed_experts}"
            )
        if self.num_hash_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_hash_layers is {self.num_hash_layers}: expected at most "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.rope_beta_fast < self.rope_beta_slow:
            raise ValueError(
                f"rope_beta_fast is {self.rope_beta_fast:g}: expected at least rope_beta_slow = {self.rope_beta_slow:g}"
            )
        for name, ids in (("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)):
            for token in ids if isinstance(ids, tuple) else (ids,):
                if token is not None and token >= self.vocab_size:
                    raise ValueError(f"{name} is {token}: expected less than vocab_size = {self.vocab_size}")

    @property
    def nope_dim(self) -> int:
        """The values of a head that carry no position: the first `head_dim - rope_dim`."""
        return self.head_dim - self.rope_dim

    @property
    def attention_of_ratio(self) -> dict[int, str]:
        """Tokens per compressed entry -> the attention of a layer with that ratio, in Hugging Face's words."""
        return dict(zip((0, self.csa_ratio, self.hca_ratio), KNOWN_RATIOS.values(), strict=True))

    @property
    def block_size(self) -> int:
        """Tokens a paged block covers: the least common multiple of the two ratios (128 in the released models)."""
        return math.lcm(self.csa_ratio, self.hca_ratio)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as a tuple whatever the file wrote; () for none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def schedule(self) -> tuple[LayerSpec, ...]:
        """`build_schedule` of this configuration: what each layer is made of."""
        return build_schedule(self)

    @property
    def geometry(self) -> CacheGeometry:
        """What the cache of this model needs to know."""
        return CacheGeometry(
            layers=tuple(spec.attn for spec in self.schedule),
            head_dim=self.head_dim,
            rope_dim=self.rope_dim,
            window=self.sliding_window,
            index_head_dim=self.index_head_dim,
            csa_ratio=self.csa_ratio,
            hca_ratio=self.hca_ratio,
        )

    def replace(self, **overrides: Any) -> DSV4Config:
        """A copy with other values for some fields, checked like a new one.

        Raises:
          ValueError: a name that is no field, or a value the configuration refuses.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"{shorten(name)} is no field of DSV4Config: expected one of {', '.join(sorted(known))}"
                )
        return dataclasses.replace(self, **overrides)

    @classmethod
    def flash(cls) -> DSV4Config:
        """DeepSeek-V4-Flash: 43 layers (2 SWA, 21 CSA, 20 HCA), hidden size 4096."""
        return cls(
            num_hidden_layers=43,
            compress_ratios=(0, 0, *(4, 128) * 20, 4),
            hidden_size=4096,
            num_attention_heads=64,
            q_lora_rank=1024,
            o_groups=8,
            index_topk=512,
            n_routed_experts=256,
            moe_intermediate_size=2048,
            routed_scaling_factor=1.5,
            **_RELEASED,
        )

    @classmethod
    def pro(cls) -> DSV4Config:
        """DeepSeek-V4-Pro: 61 layers (30 CSA, 31 HCA), hidden size 7168."""
        return cls(
            num_hidden_layers=61,
            compress_ratios=(128, 128, *(4, 128) * 29, 4),
            hidden_size=7168,
            num_attention_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            index_topk=1024,
            n_routed_experts=384,
            moe_intermediate_size=3072,
            routed_scaling_factor=2.5,
            **_RELEASED,
        )

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> DSV4Config:
        """Reads a configuration in any of the three ways files name its fields.

        Args:
          source: a folder with a `config.json`, such a file, or what it would parse to.
            Keys this library has no use for are ignored. A list with one entry per layer may be
            longer than the layers (draft layers): its beginning is taken. Two ratios in
            `compress_ratios` that are not 4 and 128 are csa_ratio, the smaller, and hca_ratio.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: broken or oversized JSON; a field missing, of the wrong type, out of range,
            or given twice with different values; an unknown ratio or layer type; a list shorter
            than the layers. A file's name comes first, then the field as the file names it.
        """
        if isinstance(source, Mapping):
            return cls(**gather(source, dataclasses.fields(cls)))
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(f"from_hf got {shorten(source)}: expected a path or a mapping")
        path = os.fspath(source)
        if os.path.isdir(path):
            path = os.path.join(path, "config.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file; expected a config.json, or a folder that holds one")
        raw = read_json_object(path, max_bytes=MAX_CONFIG_BYTES)
        try:
            return cls(**gather(raw, dataclasses.fields(cls)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


_RELEASED: dict[str, Any] = {
    "vocab_size": 129280,
    "sliding_window": 128,
    "max_position_embeddings": 1048576,
    "head_dim": 512,
    "rope_dim": 64,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_factor": 16.0,
    "rope_original_max_position": 65536,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "swiglu_limit": 10.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
