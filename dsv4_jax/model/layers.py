"""The small parts that everything else is made of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..ops.nn.dense import multiply_each
from ..ops.nn.projection import (
    BlockScaledWeight,
    Gated,
    Normed,
    prepared,
    project,
    project_each,
    project_groups,
    project_through,
)
from ..ops.nn.rms_norm import rms_norm

Array = jax.Array


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: the default on a GPU is TF32, which flips expert choices on near-ties."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """y = x W^T; the weight is (out, in), as checkpoints have it.

    Attributes:
      weight: (out, in) of a float type, or the E4M3 codes of a weight that is held as released, uint8.
      scale: with codes, their scales (ceil(out / 128), ceil(in / 128)), E8M0 as uint8; otherwise it is not there.
      dtype: what is computed in.
    """

    scale: nnx.Param

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(in_features**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), dtype))
        self.dtype = jnp.dtype(dtype)

    @jax.named_scope("projection")
    def __call__(self, x: Array, before: Normed | Gated | None = None) -> Array:
        """x (..., in) -> (..., out), in `dtype`; `before`: what becomes of x first."""
        if before is None:
            x = x.astype(self.dtype)
        if hasattr(self, "scale") and x.dtype == self.dtype:
            return project(x, BlockScaledWeight(self.weight[...], self.scale[...]), before=before)
        x = prepared(x, before).astype(self.dtype)
        if hasattr(self, "scale"):
            return project(x, BlockScaledWeight(self.weight[...], self.scale[...]))
        weight = self.weight[...].astype(self.dtype)
        return jnp.einsum("...i,oi->...o", x, weight, precision=matmul_precision(self.dtype))

    @jax.named_scope("projection")
    def in_groups(self, x: Array) -> Array:
        """Each of G groups with its own out / G rows of the weight: x (T, G, in) -> (T, G, out / G), in `dtype`."""
        x = x.astype(self.dtype)
        if hasattr(self, "scale"):
            return project_groups(x, BlockScaledWeight(self.weight[...], self.scale[...]))
        weight = self.weight[...].astype(self.dtype).reshape(x.shape[1], -1, x.shape[2])
        # "tgo" at once would make the weight the left side, and XLA:CPU transpose all of x for it.
        return jnp.einsum("tgi,goi->gto", x, weight, precision=matmul_precision(self.dtype)).swapaxes(0, 1)


@jax.named_scope("projection")
def project_by_each(x: Array, linears: Sequence[Linear]) -> tuple[Array, ...]:
    """x (..., in) through each of these, (..., out) each: on a GPU one launch for FP8 and one for bfloat16 weights."""
    x = x.astype(linears[0].dtype)
    if all(linear.weight.dtype == jnp.bfloat16 == x.dtype for linear in linears):
        results = multiply_each(x.reshape(-1, x.shape[-1]), [linear.weight[...] for linear in linears])
        return tuple(y.reshape(*x.shape[:-1], -1) for y in results)
    if not all(hasattr(linear, "scale") for linear in linears):
        return tuple(linear(x) for linear in linears)
    weights = [BlockScaledWeight(linear.weight[...], linear.scale[...]) for linear in linears]
    return project_each(x, weights)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; weight (dim,) float32."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:
        """x (..., dim), its dtype kept."""
        return rms_norm(x, self.weight[...], eps=self.eps)

    @property
    def inside(self) -> Normed:
        """The same inside the product that follows."""
        return Normed(self.weight[...], self.eps)


@jax.named_scope("projection")
def project_twice(x: Array, firsts: Sequence[Linear], second: Linear, norm: RMSNorm | None = None) -> tuple[Array, ...]:
    """x (T, G, in) through each of `firsts`, (T, out), and the first of these results, normed, through `second`.

    Where there are several of `firsts`, G is 1. On a GPU a few tokens take one call for all of it.
    """
    x = x.astype(second.dtype)
    if all(hasattr(linear, "scale") for linear in (*firsts, second)):
        weights = [BlockScaledWeight(linear.weight[...], linear.scale[...]) for linear in (*firsts, second)]
        return project_through(x, weights[:-1], weights[-1], norm=None if norm is None else norm.inside)
    if x.shape[1] == 1:
        results = project_by_each(x[:, 0], firsts)
    else:
        results = tuple(linear.in_groups(x).reshape(x.shape[0], -1) for linear in firsts)
    return (*results, second(results[0], None if norm is None else norm.inside))


class Embedding(nnx.Module):
    """A row per token id; weight (vocabulary, hidden)."""

    def __init__(self, vocab_size: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, hidden), dtype))

    @jax.named_scope("embedding")
    def __call__(self, token_ids: Array) -> Array:
        """token_ids (T,) int32 -> (T, hidden)."""
        return self.weight[...][token_ids]
