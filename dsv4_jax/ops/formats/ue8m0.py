"""The engines' record: E4M3 codes with a power-of-two scale per 64 values, 584 bytes for a vector of 448 + 64.

It is the released model's own grid (arXiv 2606.19348, section 2.3.4) and what torch engines keep in their caches.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .fp8 import AMAX_FLOOR, decode_e4m3, encode_e4m3

Array = jax.Array

GROUP = 64
"""Values that share a scale."""

_MANTISSA_448 = 0x600000  # 448 = 1.75 * 2^8
_NAN = 0xFF
_F32_INF, _F32_ONE = 0x7F800000, 0x3F800000
_FLOOR_BITS = int(np.float32(AMAX_FLOOR).view(np.int32))


def scale_bytes(width: int) -> int:
    """Bytes of the scales of `width` values: one a group, padded to a multiple of 8; ValueError if they do not fit."""
    if width % GROUP:
        raise ValueError(f"fp8_ue8m0 needs a multiple of {GROUP} values without position, got {width}")
    return -(-width // GROUP // 8) * 8


def _power_of_two(scale: Array) -> Array:
    """E8M0 byte -> 2^(byte - 127) float32, NaN for 0xff."""
    value = jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    return jnp.where(scale == _NAN, jnp.float32(jnp.nan), value)


def quantise_ue8m0(x: Array) -> tuple[Array, Array]:
    """x (..., n) float32 | bfloat16 -> codes (..., n) uint8 (E4M3), scales (..., scale_bytes(n)) uint8 (E8M0, then 0).

    Per 64 values: amax, floor 1e-4; scale 2^ceil(log2(amax / 448)), found from the bits of amax; code = E4M3 of
    x / scale, which is exact before the one rounding to nearest even. A group with a NaN or an infinity gets scale 0xff
    and codes 0x7f, and reads back as NaN. Raises ValueError when n is not a multiple of 64.
    """
    padded = scale_bytes(x.shape[-1])
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    # On the bits, non-negative floats order like integers, NaNs last: a maximum of floats may lose a NaN on the CPU.
    amax = jnp.max(jax.lax.bitcast_convert_type(groups, jnp.int32) & 0x7FFFFFFF, axis=-1)
    finite = amax < _F32_INF
    bits = jnp.where(finite, jnp.maximum(amax, _FLOOR_BITS), _F32_ONE)
    scale = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > _MANTISSA_448).astype(jnp.int32)
    inverse = _power_of_two(254 - scale)
    codes = jnp.where(finite[..., None], encode_e4m3(groups * inverse[..., None]), jnp.uint8(0x7F))
    stored = jnp.where(finite, scale, _NAN).astype(jnp.uint8)
    pad = [(0, 0)] * (stored.ndim - 1) + [(0, padded - stored.shape[-1])]
    return codes.reshape(x.shape), jnp.pad(stored, pad)


def dequantise_ue8m0(codes: Array, scales: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """codes (..., n), scales (..., scale_bytes(n)) uint8 -> (..., n): float32(E4M3 code) * scale, cast to `dtype`."""
    groups = decode_e4m3(codes).reshape(*codes.shape[:-1], codes.shape[-1] // GROUP, GROUP)
    value = groups * _power_of_two(scales[..., : groups.shape[-2]])[..., None]
    return value.reshape(codes.shape).astype(dtype)
