"""Mixture of experts with a learned or a hash router (arXiv 2606.19348, section 2.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..ops.nn.experts import ExpertWeights, Fp4Weight, apply_experts
from ..ops.nn.projection import Gated
from ..ops.nn.router import ByScore, ByToken, route
from ..ops.nn.swiglu import swiglu
from .config import DSV4Config
from .expert_parallel import exchange
from .layer_schedule import LayerSpec, RouterMode
from .layers import Linear, matmul_precision, project_by_each

Array = jax.Array


class Router(nnx.Module):
    """Picks experts per token: by learned scores, or by a table from the token id."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, self.k = config.n_routed_experts, config.num_experts_per_tok
        init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (experts, config.hidden_size), dtype))
        self.scaling = config.routed_scaling_factor
        self.hashed = spec.router_mode is RouterMode.HASH
        if self.hashed:
            ids = jnp.arange(config.vocab_size * self.k, dtype=jnp.int32).reshape(config.vocab_size, self.k)
            self.tid2eid = nnx.Variable(ids % experts)
        else:
            self.bias = nnx.Param(jnp.zeros((experts,), jnp.float32))

    @jax.named_scope("router")
    def __call__(self, x: Array, token_ids: Array, slots: Array | None = None) -> tuple[Array, Array]:
        """x (T, hidden), token_ids and slots (T,) -> experts (T, k) int32, weights (T, k) float32; none for padding."""
        weight = self.weight[...]
        if not x.dtype == weight.dtype == jnp.bfloat16:
            x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        rule = ByToken(self.tid2eid[...], token_ids) if self.hashed else ByScore(self.bias[...])
        return route(x, weight, rule, k=self.k, scaling=self.scaling, slots=slots)


class Experts(nnx.Module):
    """The routed experts, stacked.

    Attributes:
      w1, w2, w3: (E, inner, hidden), w2 (E, hidden, inner), of a float type; or FP4 codes as released, two in a byte:
        uint8 with half the last size.
      w1_scale, w2_scale, w3_scale: with codes, their scales, a last size of a 32nd, E8M0 as uint8; otherwise not there.
      dtype: what is computed in.
      axes: mesh axes over which the experts are spread; empty where one device has all of them (`shard_model`).
    """

    w1_scale: nnx.Param
    w2_scale: nnx.Param
    w3_scale: nnx.Param

    def __init__(self, config: DSV4Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit, self.dtype = config.swiglu_limit, jnp.dtype(dtype)
        self.axes: tuple[str, ...] = ()
        # Computing a few experts for every token beats sorting tokens by expert; many experts do not.
        self.dense = e <= 8 * config.num_experts_per_tok
        wide, narrow = nnx.initializers.normal(hidden**-0.5), nnx.initializers.normal(inner**-0.5)
        self.w1 = nnx.Param(wide(rngs.params(), (e, inner, hidden), dtype))
        self.w2 = nnx.Param(narrow(rngs.params(), (e, hidden, inner), dtype))
        self.w3 = nnx.Param(wide(rngs.params(), (e, inner, hidden), dtype))

    @jax.named_scope("experts")
    def __call__(self, x: Array, picks: Array, weights: Array) -> Array:
        """x (T, hidden), picks and weights (T, k) -> (T, hidden). A pick of an expert that is not here adds nothing."""
        if self.axes:  # picks count the experts of all devices
            picks = picks - self.w1.shape[0] * jax.lax.axis_index(self.axes).astype(jnp.int32)
        if hasattr(self, "w1_scale"):
            experts = ExpertWeights(
                Fp4Weight(self.w1[...], self.w1_scale[...]),
                Fp4Weight(self.w2[...], self.w2_scale[...]),
                Fp4Weight(self.w3[...], self.w3_scale[...]),
            )
            return apply_experts(x.astype(self.dtype), picks, weights, experts, limit=self.limit)
        if not self.dense:
            return self._grouped(x, picks, weights)
        if self.axes:  # a single token's picks may all be elsewhere
            return self._dense(x, picks, weights)
        return self._single(x, picks, weights) if x.shape[0] == 1 else self._dense(x, picks, weights)

    def _single(self, x: Array, picks: Array, weights: Array) -> Array:
        """One token: only the experts it picked are read."""
        out = jnp.zeros((x.shape[1],), self.dtype)
        for expert, weight in zip(picks[0], weights[0], strict=True):
            w1, w2, w3 = (
                jax.lax.dynamic_index_in_dim(w[...], expert, keepdims=False).astype(self.dtype)
                for w in (self.w1, self.w2, self.w3)
            )
            precision = matmul_precision(w1.dtype)
            gate, up = (jnp.einsum("h,ih->i", x[0], w, precision=precision) for w in (w1, w3))
            inner = swiglu(gate, up, self.limit) * weight.astype(gate.dtype)
            out = out + jnp.einsum("i,hi->h", inner, w2, precision=precision)
        return out[None]

    def _dense(self, x: Array, picks: Array, weights: Array) -> Array:
        w1, w2, w3 = (w[...].astype(self.dtype) for w in (self.w1, self.w2, self.w3))
        precision = matmul_precision(w1.dtype)
        experts, size, hidden = w1.shape
        # One product for all experts; their two axes as one, or XLA would transpose the weights for it.
        gate, up = (
            jnp.einsum("th,oh->to", x, w.reshape(-1, hidden), precision=precision).reshape(-1, experts, size)
            for w in (w1, w3)
        )
        # One weight per expert and token, zero for those not picked; it goes in before w2, which is linear.
        share = jnp.sum(jax.nn.one_hot(picks, experts) * weights[..., None], axis=1)
        inner = swiglu(gate, up, self.limit) * share[..., None].astype(gate.dtype)
        if x.shape[0] <= size:
            # Few tokens are summed over experts afterwards: for one product XLA has to transpose all of w2.
            return jnp.sum(jnp.einsum("tei,ehi->eth", inner, w2, precision=precision), axis=0)
        w2 = w2.swapaxes(1, 2).reshape(-1, hidden)
        return jnp.einsum("to,oh->th", inner.reshape(-1, experts * size), w2, precision=precision)

    def _grouped(self, x: Array, picks: Array, weights: Array) -> Array:
        w1, w2, w3 = (w[...].astype(self.dtype).swapaxes(1, 2) for w in (self.w1, self.w2, self.w3))
        precision = matmul_precision(w1.dtype)
        here = (picks >= 0) & (picks < w1.shape[0])
        flat = jnp.where(here, picks, w1.shape[0]).reshape(-1)  # what is not here comes last, in no group
        order = jnp.argsort(flat, stable=True)
        token = order // picks.shape[1]
        sizes = jnp.bincount(flat, length=w1.shape[0]).astype(jnp.int32)
        rows = x[token]
        gate = jax.lax.ragged_dot(rows, w1, sizes, precision=precision)
        up = jax.lax.ragged_dot(rows, w3, sizes, precision=precision)
        out = jax.lax.ragged_dot(swiglu(gate, up, self.limit), w2, sizes, precision=precision)
        out = jnp.where(here.reshape(-1)[order][:, None], out.astype(jnp.float32), 0.0)
        out = out * weights.reshape(-1)[order][:, None]
        # Back to (token, pick) order before summing, so that the sum does not depend on the other tokens.
        by_pick = jnp.zeros_like(out).at[order].set(out).reshape(*picks.shape, -1)
        return jnp.sum(by_pick, axis=1).astype(x.dtype)


class SharedExpert(nnx.Module):
    """The expert every token passes through."""

    def __init__(self, config: DSV4Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(hidden, inner, dtype=dtype, rngs=rngs)
        self.w2 = Linear(inner, hidden, dtype=dtype, rngs=rngs)
        self.w3 = Linear(hidden, inner, dtype=dtype, rngs=rngs)

    @jax.named_scope("shared_expert")
    def __call__(self, x: Array) -> Array:
        """x (T, hidden) -> (T, hidden)."""
        gate, up = project_by_each(x, (self.w1, self.w3))
        return self.w2(gate, Gated(up, self.limit))


class MoE(nnx.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: DSV4Config, spec: LayerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = Router(config, spec, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.shared_experts = SharedExpert(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, token_ids: Array) -> Array:
        """x (T, hidden), token_ids (T,) int32 -> (T, hidden)."""
        routed, shared = self.parts(x, token_ids)
        return routed if shared is None else routed + shared

    def parts(self, x: Array, token_ids: Array, slots: Array | None = None) -> tuple[Array, Array | None]:
        """What routed experts and the shared one give, (T, hidden) each, to be added; or their sum, and None.

        Of padding, a token of a slot below 0, no routed expert is read.
        """

        def add(x: Array, token_ids: Array, slots: Array | None) -> Array:
            return self.experts(x, *self.gate(x, token_ids, slots))

        axes = self.experts.axes
        routed = exchange(add, x, token_ids, slots, axis=axes[0]) if axes else add(x, token_ids, slots)
        shared = self.shared_experts(x)
        if axes[1:]:  # each device along them has a part of both
            return jax.lax.psum(routed + shared.astype(routed.dtype), axes[1:]).astype(x.dtype), None
        return routed.astype(x.dtype), shared
