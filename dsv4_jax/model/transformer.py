"""The whole model: embedding, blocks over residual streams, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ..cache.handle import LayerCacheHandle
from ..cache.kv_cache import KVCache
from ..cache.plan import StepPlan
from ..ops.nn.hyper_connect import Mixing, Update, hyper_connect
from ..ops.nn.rope import rope_angles
from .attention import Attention
from .config import DSV4Config
from .layer_schedule import AttentionType, LayerSpec, build_schedule
from .layers import Embedding, Linear, RMSNorm
from .moe import MoE
from .residual import HyperHead
from .step_inputs import check_step

Array = jax.Array


class Block(nnx.Module):
    """Attention and experts, each between a read of the residual streams and a write back."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, spec, dtype=dtype, rngs=rngs)
        self.ffn = MoE(config, spec, dtype=dtype, rngs=rngs)
        n, d = config.hc_mult, config.hidden_size
        for part in ("attn", "ffn"):
            fn = nnx.initializers.normal(0.02)(rngs.params(), ((2 + n) * n, n * d), jnp.float32)
            setattr(self, f"hc_{part}_fn", nnx.Param(fn))
            setattr(self, f"hc_{part}_base", nnx.Param(jnp.zeros(((2 + n) * n,), jnp.float32)))
            setattr(self, f"hc_{part}_scale", nnx.Param(jnp.ones((3,), jnp.float32)))

    @jax.named_scope("streams")
    def _connect(self, part: str, streams: Array, update: Update | None) -> tuple[Array, Array, Array, Array]:
        c = self.config
        mixing = Mixing(*(getattr(self, f"hc_{part}_{name}")[...] for name in Mixing._fields))
        return hyper_connect(
            streams, update, mixing, getattr(self, f"{part}_norm").weight[...], iterations=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps, rms_eps=c.rms_norm_eps,
        )  # fmt: skip

    def __call__(
        self,
        streams: Array,
        update: Update | None,
        token_ids: Array,
        handle: LayerCacheHandle,
        angles: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Update, LayerCacheHandle]:
        """One layer.

        Args:
          streams: (T, hc_mult, hidden), without the last update.
          update: of the layer before, None in the first.
          token_ids: (T,) int32.
          handle: of the cache.
          angles: as in `Attention`.

        Returns:
          The streams without this layer's last update, that update, and the handle after the layer's writes.
        """
        streams, x, post, comb = self._connect("attn", streams, update)
        out, handle = self.attn(x, handle, angles)
        streams, x, post, comb = self._connect("ffn", streams, Update(out, post, comb))
        routed, shared = self.ffn.parts(x, token_ids, jnp.asarray(handle.plan.slots))
        return streams, Update(routed, post, comb, shared), handle


class DSV4Model(nnx.Module):
    """DeepSeek-V4 over a KV cache: a step takes any mix of prefill and decode tokens."""

    def __init__(self, config: DSV4Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Random weights of `dtype` (norms, sinks, ape, router bias and stream weights stay float32)."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.mesh: Mesh | None = None  # where the weights are spread over one (`shard_model`)
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, spec, dtype=dtype, rngs=rngs) for spec in build_schedule(config)])
        self.hc_head = HyperHead(config, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def hidden(self, token_ids: Array, cache: KVCache, plan: StepPlan) -> tuple[Array, KVCache]:
        """One step without the head: token_ids (T,) int32 -> normed final state (T, hidden), cache after the step."""
        check_step(self.config, token_ids, cache, plan)
        cache = cache.with_blocks(plan.new_blocks)
        x = self.embed(token_ids).astype(self.dtype)
        streams = jnp.broadcast_to(x[:, None], (x.shape[0], self.config.hc_mult, x.shape[1]))
        update, angles = None, {}
        for layer_idx, block in enumerate(self.layers):
            theta = block.attn.kind is AttentionType.SWA  # there are two
            if theta not in angles:
                angles[theta] = rope_angles(jnp.asarray(plan.positions), block.attn.inv_freq)
            handle = LayerCacheHandle(cache, plan, layer_idx)
            streams, update, handle = block(streams, update, token_ids, handle, angles[theta])
            cache = handle.cache
        return self.hc_head(streams, update, self.norm.weight[...]), cache

    @jax.named_scope("head")
    def logits(self, hidden: Array) -> Array:
        """hidden (..., hidden) -> (..., vocabulary) float32."""
        if self.config.tie_word_embeddings:
            weight = self.embed.weight[...].astype(self.dtype)
            return jnp.einsum("...h,vh->...v", hidden, weight, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)

    def __call__(self, token_ids: Array, cache: KVCache, plan: StepPlan) -> tuple[Array, KVCache]:
        """One step: token_ids (T,) int32, laid out as `plan` -> logits (T, vocabulary) float32, cache after it.

        Raises ValueError for token ids of another shape or dtype, and for a cache of another configuration.
        """
        hidden, cache = self.hidden(token_ids, cache, plan)
        return self.logits(hidden), cache


def check_model(model: Any) -> None:
    """ValueError for what is no model, such as the path of one."""
    if not hasattr(model, "config"):
        raise ValueError(f"model is {model!r:.80}: expected a DSV4Model, as from_pretrained returns it")
