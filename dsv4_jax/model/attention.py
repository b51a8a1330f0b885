"""Attention of one layer over the window and the compressed entries (arXiv 2606.19348, section 2.3)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..cache.handle import LayerCacheHandle
from ..ops.nn.rms_norm import rms_norm
from ..ops.nn.rope import apply_rope, rope_angles, rope_frequencies
from ..ops.read.attend import RawQuery
from ..ops.write.append_swa_fused import RawWindow
from ..ops.write.compress import CompressorWeights, Projections
from .config import DSV4Config
from .layer_schedule import AttentionType, LayerSpec
from .layers import Linear, RMSNorm, project_by_each, project_twice

Array = jax.Array


class Compressor(nnx.Module):
    """Projections of a compressor; the pooling itself belongs to the cache."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = dim * (2 if spec.attn is AttentionType.CSA else 1)
        self.wkv = Linear(config.hidden_size, width, dtype=dtype, rngs=rngs)
        self.wgate = Linear(config.hidden_size, width, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(dim, eps=config.rms_norm_eps)
        self.ape = nnx.Param(jnp.zeros((spec.compress_ratio, width), jnp.float32))

    @property
    def linears(self) -> tuple[Linear, Linear]:
        """Its projections of a token."""
        return self.wkv, self.wgate

    def __call__(self, kv: Array, gate: Array, inv_freq: Array) -> Projections:
        """The results of `linears` (T, width) -> what the cache needs to turn tokens into entries."""
        return Projections(kv, gate, CompressorWeights(self.ape[...], self.norm.weight[...], inv_freq))


class Indexer(nnx.Module):
    """Scores compressed entries and picks the best (CSA)."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.k = config.index_n_heads, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * config.index_head_dim, dtype=dtype, rngs=rngs)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype=dtype, rngs=rngs)
        self.compressor = Compressor(config, spec, config.index_head_dim, dtype=dtype, rngs=rngs)

    def select(
        self, weights: Array, low: Array, norm: RMSNorm, cos: Array, sin: Array, handle: LayerCacheHandle
    ) -> Array:
        """Entries to attend to (T, k) int32, -1: none.

        weights (T, heads) of `weights_proj`, low (T, q_lora_rank) and the norm it has yet to take.
        """
        q = self.wq_b(low, norm.inside).reshape(low.shape[0], self.heads, -1)
        return handle.select(q, weights.astype(jnp.float32) * self.heads**-0.5, self.k, raw=(cos, sin))


class Attention(nnx.Module):
    """SWA, CSA or HCA. One key-value head; keys are values."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config, self.kind = config, spec.attn
        self.axis: str | None = None  # the mesh axis along which each device has some of the heads (`shard_model`)
        heads, dim = config.num_attention_heads, config.head_dim
        make: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank, **make)
        self.q_norm = RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, heads * dim, **make)
        self.wkv = Linear(config.hidden_size, dim, **make)
        self.norm = RMSNorm(dim, eps=config.rms_norm_eps)
        self.wo_a = Linear(heads // config.o_groups * dim, config.o_groups * config.o_lora_rank, **make)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size, **make)
        self.attn_sink = nnx.Param(jnp.zeros((heads,), jnp.float32))
        if spec.attn is not AttentionType.SWA:
            self.compressor = Compressor(config, spec, dim, **make)
        if spec.attn is AttentionType.CSA:
            self.indexer = Indexer(config, spec, **make)

    @property
    def inv_freq(self) -> Array:
        """RoPE frequencies of this layer, (rope_dim // 2,) float32."""
        c = self.config
        if self.kind is AttentionType.SWA:
            return jnp.asarray(rope_frequencies(c.rope_dim, c.rope_theta))
        return jnp.asarray(
            rope_frequencies(
                c.rope_dim,
                c.compress_rope_theta,
                factor=c.rope_factor,
                original_max_position=c.rope_original_max_position,
                beta_fast=c.rope_beta_fast,
                beta_slow=c.rope_beta_slow,
            )
        )

    @jax.named_scope("attention")
    def __call__(
        self, x: Array, handle: LayerCacheHandle, angles: tuple[Array, Array] | None = None
    ) -> tuple[Array, LayerCacheHandle]:
        """x (T, hidden), normed -> output (T, hidden) and the handle after this layer's writes.

        angles: cos and sin of the tokens' positions, where they are known from another layer of the same `inv_freq`.
        """
        c = self.config
        cos, sin = angles or rope_angles(jnp.asarray(handle.plan.positions), self.inv_freq)
        low, raw, q = project_twice(x[:, None], (self.wq_a, self.wkv), self.wq_b, self.q_norm)
        q = q.reshape(x.shape[0], -1, c.head_dim)
        norm, eps = self.norm.weight[...], c.rms_norm_eps
        compressor, indexer, weights = self._projections(x, handle)

        fresh = None
        if handle.plan.one_token_per_slot:
            handle = handle.write_layer(RawWindow(raw, norm, cos, sin), compressor, indexer, eps=eps)
        else:
            handle = handle if indexer is None else handle.write_indexer(*indexer, eps=eps)
            handle = handle if compressor is None else handle.write_compressed(*compressor, eps=eps)
            # In float32, as write_layer does it: what is stored does not depend on how a prompt is cut.
            fresh = apply_rope(rms_norm(raw.astype(jnp.float32), norm, eps=eps), cos, sin)
        selected = None if weights is None else self.indexer.select(weights, low, self.q_norm, cos, sin, handle)
        out = handle.attend(
            q, self.attn_sink[...], selected=selected, fresh=fresh, raw=RawQuery(cos, sin, eps)
        )  # fmt: skip
        out = self._project(out)
        if fresh is not None:
            handle = handle.write_swa(fresh, after=out)
        return out, handle

    def _projections(
        self, x: Array, handle: LayerCacheHandle
    ) -> tuple[Projections | None, Projections | None, Array | None]:
        """Of the compressor and of the indexer's, and the weights of the indexer's heads where entries are selected."""
        if self.kind is AttentionType.SWA:
            return None, None, None
        linears = [*self.compressor.linears]
        if self.kind is AttentionType.CSA:
            linears += self.indexer.compressor.linears
            if handle.max_entries > self.indexer.k:  # otherwise a token attends to all that it sees
                linears.append(self.indexer.weights_proj)
        kv, gate, *rest = project_by_each(x, linears)
        compressor = self.compressor(kv, gate, self.inv_freq)
        if self.kind is not AttentionType.CSA:
            return compressor, None, None
        kv, gate, *weights = rest
        return compressor, self.indexer.compressor(kv, gate, self.inv_freq), weights[0] if weights else None

    def _project(self, out: Array) -> Array:
        """Grouped output projection: (T, heads, head_dim) -> (T, hidden), of heads that are whole groups."""
        groups = out.shape[1] * self.config.o_groups // self.config.num_attention_heads
        _, projected = project_twice(out.reshape(out.shape[0], groups, -1), (self.wo_a,), self.wo_b)
        if self.axis is None:
            return projected
        return jax.lax.psum(projected.astype(jnp.float32), self.axis).astype(projected.dtype)
