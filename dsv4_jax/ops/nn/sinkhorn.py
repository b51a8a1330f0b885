"""Sinkhorn normalisation of the residual streams' mixing matrices (arXiv 2606.19348, section 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch

Array = jax.Array


def sinkhorn(matrices: Array, *, iterations: int, eps: float) -> Array:
    """Nearly doubly stochastic matrices from positive ones, matrices (T, n, n) float32 [j, k].

    Divides by the sums over j (+ eps), then iterations - 1 times by those over k and over j. On the CPU natively: XLA
    makes a kernel of each of these divisions, in every layer, and their number is most of a small model's step.
    """

    def in_jnp(x: Array) -> Array:
        def normalise(x: Array, axis: int) -> Array:
            return x / (jnp.sum(x, axis=axis, keepdims=True) + eps)

        x = normalise(x, 1)
        for _ in range(iterations - 1):
            x = normalise(normalise(x, 2), 1)
        return x

    def in_native(x: Array) -> Array:
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return dispatch.ffi_call("dsv4_sinkhorn", result)(x, iterations=np.int64(iterations), eps=np.float32(eps))

    if "cpu" not in dispatch.available():
        return in_jnp(matrices)
    return dispatch.on_platform(matrices, cpu=in_native, default=in_jnp)
