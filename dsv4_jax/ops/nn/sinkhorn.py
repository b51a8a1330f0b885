"""Sinkhorn normalisation of the residual streams' mixing matrices (arXiv 2606.19348, section 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch

Array = jax.Array

_MAX_STREAMS_CUDA = 5  # a matrix fits a warp


def sinkhorn(matrices: Array, *, iterations: int, eps: float, implementation: str | None = None) -> Array:
    """Nearly doubly stochastic matrices from positive ones.

    Divides by the sums over j (+ eps), then iterations - 1 times by those over k and over j. Natively wherever that can
    be: XLA makes a kernel of each of these divisions, in every layer.

    Args:
      matrices: (T, n, n) float32, [j, k].
      iterations: at least 1.
      eps: added to every sum.
      implementation: None, "jnp", "cpu" or "cuda" (n at most 5); the native ones give the same bits.

    Returns:
      (T, n, n) float32.
    """

    def in_jnp(x: Array) -> Array:
        def normalise(x: Array, axis: int) -> Array:
            return x / (jnp.sum(x, axis=axis, keepdims=True) + eps)

        # A loop: unrolled, compiling the model for a GPU takes minutes.
        return jax.lax.fori_loop(1, iterations, lambda _, x: normalise(normalise(x, 2), 1), normalise(x, 1))

    def in_native(x: Array) -> Array:
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return dispatch.ffi_call("dsv4_sinkhorn", result)(x, iterations=np.int64(iterations), eps=np.float32(eps))

    def limit(platform: str) -> str | None:
        if platform == "cuda" and matrices.shape[1] > _MAX_STREAMS_CUDA:
            return f"{matrices.shape[1]} streams; it takes up to {_MAX_STREAMS_CUDA}"
        return None

    return dispatch.call("sinkhorn", implementation, limit, in_native, in_jnp, matrices)
