"""Rotary position embedding on the last dimensions of a head (DeepSeek-V4 report, arXiv 2606.19348, section 2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rope_frequencies(
    rope_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_position: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Inverse frequencies (rope_dim // 2,) float32, radians per token; YaRN interpolation where factor > 1."""
    inv_freq = 1.0 / theta ** (np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    if factor > 1.0:

        def dimension(rotations: float) -> float:
            return rope_dim * math.log(original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(beta_fast)), 0)
        high = min(math.ceil(dimension(beta_slow)), rope_dim - 1)
        ramp = np.clip((np.arange(rope_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        inv_freq = inv_freq * (1.0 - ramp) + inv_freq / factor * ramp
    return inv_freq.astype(np.float32)


def rope_angles(positions: Array, inv_freq: Array) -> tuple[Array, Array]:
    """cos and sin, each (..., rope_dim // 2) float32, of positions (...) int32."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq).reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array, *, inverse: bool = False) -> Array:
    """Rotates the last 2 * cos.shape[-1] dimensions of x (..., d), pairs interleaved, in float32.

    cos, sin: (..., rope_dim // 2), broadcast against x's leading dimensions (same rank as x). Returns x's dtype.
    """
    rope_dim = 2 * cos.shape[-1]
    plain, rotated = x[..., :-rope_dim], x[..., -rope_dim:].astype(jnp.float32)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    sin = -sin if inverse else sin
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([plain, pairs.reshape(rotated.shape).astype(x.dtype)], axis=-1)
