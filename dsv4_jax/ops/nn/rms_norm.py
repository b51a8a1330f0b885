"""Root-mean-square normalisation, in float32."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array, weight: Array | None = None, *, eps: float) -> Array:
    """x (..., d) / sqrt(mean(x^2) + eps) * weight (d,), computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(x.dtype)
