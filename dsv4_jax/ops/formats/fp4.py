"""FP4 (E2M1) keys of the CSA indexer, with a scale per group of values (arXiv 2606.19348, section 2.3).

"nvfp4" has an E4M3 scale per 16 values, "mxfp4" a power-of-two (E8M0) scale per 32. Two codes share a byte, the even
index in the low nibble. Non-finite input: the group's scale is stored as NaN (E4M3 0x7f, E8M0 0xff) and its codes as
0x7, so the whole group reads back as NaN: visible, never quietly wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .fp8 import AMAX_FLOOR, decode_e4m3, divide_by, encode_e4m3

Array = jax.Array

GROUP_SIZE = {"nvfp4": 16, "mxfp4": 32}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _group_size(format: str) -> int:
    if format not in GROUP_SIZE:
        raise ValueError(f"FP4 format {format!r} is not known: choose one of {sorted(GROUP_SIZE)}")
    return GROUP_SIZE[format]


def _encode_e2m1(x: Array, scale: Array) -> Array:
    """Code 0..15 (uint8) of the E2M1 value nearest to x / scale, ties to the even code, clamped to +-6.

    The bounds between codes times a scale of at most 4 significant bits are exact in float32, so nothing is divided.
    """
    a = jnp.abs(x)
    code = (a > 0.25 * scale).astype(jnp.uint8)
    for bound, even_above in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code = code + ((a >= bound * scale) if even_above else (a > bound * scale)).astype(jnp.uint8)
    return code | (jnp.signbit(x).astype(jnp.uint8) << jnp.uint8(3))


def _power_of_two_scale(amax: Array) -> Array:
    """Smallest E8M0 byte whose power of two is at least amax / 6, exactly, from the float's bits."""
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # 6 = 1.5 * 4: amax / 6 = (m / 1.5) * 2^(e - 2), which is above 2^(e - 2) iff the mantissa m is above 1.5.
    return jnp.clip(exponent - 2 + (mantissa > 0x400000).astype(jnp.int32), 0, 254).astype(jnp.uint8)


def power_of_two(scale: Array) -> Array:
    """E8M0 byte -> float32 power of two (NaN for 0xff); bytes below 1 do not arise from quantising."""
    value = jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    return jnp.where(scale == 0xFF, jnp.float32(jnp.nan), value)


def quantise_fp4(x: Array, format: str) -> tuple[Array, Array]:
    """x (..., n) float32 -> codes (..., n // 2) uint8, scales (..., n // group) uint8.

    Scale: amax over the group, floor 1e-4; "nvfp4": E4M3 of amax / 6, at least the smallest subnormal 2^-9 (so a
    group is never stored without a scale); "mxfp4": 2^ceil(log2(amax / 6)). Code = E2M1 nearest to x / scale, ties to
    even. Raises ValueError for an unknown format or when n is not a multiple of the group.
    """
    group = _group_size(format)
    if x.shape[-1] % group:
        raise ValueError(f"FP4 format {format!r} needs a multiple of {group} values, got {x.shape[-1]}")
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    # On the bits, non-negative floats order like integers, NaNs last: a maximum of floats may lose a NaN on the CPU.
    bits = jnp.max(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF, axis=-1)
    finite = bits < 0x7F800000
    bits = jnp.where(finite, jnp.maximum(bits, int(np.float32(AMAX_FLOOR).view(np.int32))), 0x3F800000)
    amax = jax.lax.bitcast_convert_type(bits, jnp.float32)
    if format == "nvfp4":
        sixth = divide_by(jax.lax.bitcast_convert_type(amax, jnp.int32), 2, 1)
        scale = jnp.maximum(encode_e4m3(jax.lax.bitcast_convert_type(sixth, jnp.float32)), jnp.uint8(1))
        value, nan = decode_e4m3(scale), jnp.uint8(0x7F)
    else:
        scale = _power_of_two_scale(amax)
        value, nan = power_of_two(scale), jnp.uint8(0xFF)
    codes = _encode_e2m1(x, value[..., None])
    codes = jnp.where(finite[..., None], codes, jnp.uint8(7)).reshape(*x.shape[:-2], x.shape[-2] * group)
    return codes[..., 0::2] | (codes[..., 1::2] << jnp.uint8(4)), jnp.where(finite, scale, nan)


def dequantise_fp4(codes: Array, scales: Array, format: str) -> Array:
    """codes (..., n // 2), scales (..., n // group) uint8 -> (..., n) float32: E2M1 value * scale."""
    group = _group_size(format)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    nibbles = jnp.stack([codes & jnp.uint8(0xF), codes >> jnp.uint8(4)], axis=-1).reshape(shape)
    magnitude = (nibbles & jnp.uint8(7)).astype(jnp.int32)
    # 0 and 0.5 are the subnormals of E2M1; from 1 on the code is a float's exponent and first mantissa bit.
    value = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, value)
    value = jnp.where(nibbles > 7, -value, value)
    scale = decode_e4m3(scales) if format == "nvfp4" else power_of_two(scales)
    return (value.reshape(*scales.shape, group) * scale[..., None]).reshape(shape)


def hadamard_matrix(n: int) -> np.ndarray:
    """The orthonormal n-point Hadamard matrix (n, n) float32, symmetric, in Sylvester order; n a power of two."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if matrix.shape[0] != n:
        raise ValueError(f"a Hadamard matrix needs a power of two, got {n}")
    return (matrix / np.sqrt(n)).astype(np.float32)


def hadamard(x: Array) -> Array:
    """Rotates vectors by the orthonormal Hadamard matrix.

    Applied to queries and keys it leaves scores alone, and spreads outliers over the group that shares a scale.

    Args:
      x: (..., n) float32, n a power of two.

    Returns:
      (..., n) float32.
    """
    matrix = jnp.asarray(hadamard_matrix(x.shape[-1]))
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)
