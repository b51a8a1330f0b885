"""The small parts that everything else is made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..ops.nn.rms_norm import rms_norm

Array = jax.Array


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: the default on a GPU is TF32, which flips expert choices on near-ties."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """y = x W^T; the weight is (out, in), as checkpoints have it."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(in_features**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), dtype))

    def __call__(self, x: Array) -> Array:
        """x (..., in) -> (..., out), in the weight's dtype."""
        weight = self.weight[...]
        x = x.astype(weight.dtype)
        return jnp.einsum("...i,oi->...o", x, weight, precision=matmul_precision(weight.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; weight (dim,) float32."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """x (..., dim), its dtype kept."""
        return rms_norm(x, self.weight[...], eps=self.eps)


class Embedding(nnx.Module):
    """A row per token id; weight (vocabulary, hidden)."""

    def __init__(self, vocab_size: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, hidden), dtype))

    def __call__(self, token_ids: Array) -> Array:
        """token_ids (T,) int32 -> (T, hidden)."""
        return self.weight[...][token_ids]
