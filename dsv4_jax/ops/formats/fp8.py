"""The FP8 record: E4M3 codes with one float32 scale per row, in plain ``jax.numpy``.

Every result is a function of the input's bits alone: the same on every backend, jitted or not, and the same as the
native handlers (``ffi/formats/quantise.h``). Hence the integer arithmetic: XLA turns a division by a constant or by a
broadcast value into a multiplication, divides approximately on GPUs and flushes denormals on CPUs.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

E4M3_MAX = 448.0
"""The largest finite E4M3 value."""

AMAX_FLOOR = 1e-4
"""Rows whose largest magnitude is below this are scaled as if it were this."""

_F32_INF = 0x7F800000
_F32_NAN = 0x7FC00000
_F32_MANTISSA = 0x007FFFFF
_F32_IMPLICIT_ONE = 0x00800000
_E4M3_NAN = 0x7F
_FLOOR_BITS = int(np.float32(AMAX_FLOOR).view(np.int32))
_MAX_BITS = int(np.float32(E4M3_MAX).view(np.int32))


def quantise_fp8(x: Array) -> tuple[Array, Array]:
    """Quantises rows to E4M3 with one scale per row.

    ``inv_scale = max(amax(|x|), 1e-4) / 448`` and ``code = E4M3(x / inv_scale)``: both divisions correctly rounded in
    float32, the code rounded to nearest even and clamped to ±448, the sign of zero kept. A row that holds a NaN or an
    infinity gets the scale NaN and the code 0x7f (NaN) everywhere, so that it reads back as NaN.

    Args:
      x: (..., n) float32 or bfloat16.
    Returns:
      codes (..., n) uint8, inv_scale (...) float32.
    Raises:
      TypeError: if x is neither float32 nor bfloat16.
      ValueError: if x has no axis or n is 0.
    """
    _require_float(x, "quantise_fp8")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantise_fp8: got shape {x.shape}; expected (..., n) with n >= 1.")
    bits = _bits(x.astype(jnp.float32))
    # On the bits, non-negative floats order like integers; infinities and NaNs come last, denormals are not flushed.
    amax = jnp.max(bits & 0x7FFFFFFF, axis=-1)
    finite = amax < _F32_INF
    inv_scale = divide_by(jnp.maximum(amax, _FLOOR_BITS), 3, 6)
    quotient = _divide(bits, jnp.where(finite, inv_scale, _bits(jnp.float32(1)))[..., None])
    codes = jnp.where(finite[..., None], _encode(quotient, bits), jnp.uint8(_E4M3_NAN))
    return codes, _float(jnp.where(finite, inv_scale, _F32_NAN))


def dequantise_fp8(codes: Array, inv_scale: Array, dtype=jnp.float32) -> Array:
    """Reads E4M3 rows back: ``float32(code) * inv_scale``, then cast to ``dtype``.

    Args:
      codes: (..., n) uint8.
      inv_scale: (...) float32.
      dtype: of the result.
    Returns:
      (..., n) dtype.
    Raises:
      TypeError: if codes is not uint8 or inv_scale not float32.
      ValueError: if inv_scale does not have the shape of codes without its last axis.
    """
    if codes.dtype != jnp.uint8 or inv_scale.dtype != jnp.float32:
        raise TypeError(
            f"dequantise_fp8: got codes {codes.dtype} and inv_scale {inv_scale.dtype}; expected uint8 and float32."
        )
    if codes.ndim == 0 or codes.shape[:-1] != inv_scale.shape:
        raise ValueError(
            f"dequantise_fp8: got codes {codes.shape} and inv_scale {inv_scale.shape}; expected (..., n) and (...)."
        )
    return (decode_e4m3(codes) * inv_scale[..., None]).astype(dtype)


def decode_e4m3(codes: Array) -> Array:
    """The float32 values of E4M3 codes: (...) uint8 -> (...) float32, 0x7f and 0xff being NaN."""
    code = codes.astype(jnp.int32)
    magnitude = code & 0x7F
    bits = jnp.where(magnitude == _E4M3_NAN, _F32_NAN, (magnitude << 20) + (120 << 23))
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, _float(bits))
    return jnp.where(code >= 0x80, -value, value)


def encode_e4m3(x: Array) -> Array:
    """The E4M3 codes of float32 values, to nearest even and clamped to ±448, NaN being 0x7f: (...) -> (...) uint8."""
    bits = _bits(x)
    return jnp.where((bits & 0x7FFFFFFF) > _F32_INF, jnp.uint8(_E4M3_NAN), _encode(bits, bits))


def to_bf16(x: Array) -> Array:
    """Rounds to bfloat16, nearest even; denormals are kept and every NaN becomes 0x7fc0.

    Args:
      x: (...) float32 or bfloat16.
    Returns:
      (...) bfloat16.
    Raises:
      TypeError: for any other dtype.
    """
    _require_float(x, "to_bf16")
    if x.dtype == jnp.bfloat16:
        half = lax.bitcast_convert_type(x, jnp.uint16)
        nan = (half & 0x7FFF) > 0x7F80
    else:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(jnp.uint16)
        nan = (bits & 0x7FFFFFFF) > _F32_INF
    return lax.bitcast_convert_type(jnp.where(nan, jnp.uint16(0x7FC0), half), jnp.bfloat16)


def _require_float(x: Array, name: str) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"{name}: got {x.dtype}; expected float32 or bfloat16.")


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def divide_by(bits: Array, odd_bits: int, power: int) -> Array:
    """Bits of the float32 nearest to a / ((2^odd_bits - 1) * 2^power), for bits (...) int32 of a normal a >= 2^-100.

    XLA turns a division by a constant, and by anything it broadcasts, into a multiplication, which rounds differently.
    448 is 7 * 2^6 (odd_bits 3, power 6), 6 is 3 * 2 (2, 1).
    """
    odd = (1 << odd_bits) - 1
    mantissa = (bits & _F32_MANTISSA) | _F32_IMPLICIT_ONE
    small = mantissa < odd << (24 - odd_bits)  # then the quotient needs one more bit to fill 24
    dividend = mantissa << jnp.where(small, odd_bits, odd_bits - 1)
    quotient = dividend // odd
    quotient = quotient + (2 * (dividend - odd * quotient) > odd).astype(jnp.int32)  # an odd divisor leaves no ties
    exponent = (bits >> 23) - power - jnp.where(small, odd_bits, odd_bits - 1)
    return (exponent << 23) + (quotient - _F32_IMPLICIT_ONE)


def _divide(x: Array, y: Array) -> Array:
    """Bits of the correctly rounded x / y, for finite x and normal y > 0 given as bits.

    The backend's own division, off by as much as 60 ulp, is made exact from the remainder. Quotients far below the
    smallest E4M3 value are left as they are.
    """
    rough = _bits(_float(x) / _float(y)) & 0x7FFFFFFF
    x_mantissa = (x & _F32_MANTISSA) | _F32_IMPLICIT_ONE
    y_mantissa = (y & _F32_MANTISSA) | _F32_IMPLICIT_ONE
    below = (x_mantissa < y_mantissa).astype(jnp.int32)
    # |x / y| = quotient * 2^(exponent - 150) with quotient = x_mantissa * 2^(23 + below) / y_mantissa in [2^23, 2^24).
    exponent = ((x >> 23) & 0xFF) - (y >> 23) + 127 - below
    quotient = rough - (exponent << 23) + _F32_IMPLICIT_ONE
    # The remainder is small, so its low 32 bits are all of it.
    remainder = (x_mantissa << (23 + below)) - quotient * y_mantissa
    step = jnp.round(remainder.astype(jnp.float32) / y_mantissa.astype(jnp.float32)).astype(jnp.int32)
    quotient, remainder = quotient + step, remainder - step * y_mantissa
    # The step may be off by one where the remainder is near half of the divisor; exactly half it never is.
    quotient = quotient + (2 * remainder > y_mantissa).astype(jnp.int32)
    quotient = quotient - (2 * remainder < -y_mantissa).astype(jnp.int32)
    exact = (exponent << 23) + (quotient - _F32_IMPLICIT_ONE)
    return jnp.where(rough < _bits(jnp.float32(2.0**-12)), rough, exact)


def _encode(quotient: Array, sign: Array) -> Array:
    """E4M3 codes of the magnitude of ``quotient`` with the sign of ``sign``, both the bits of finite float32 values."""
    magnitude = jnp.minimum(quotient & 0x7FFFFFFF, _MAX_BITS)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14 leaves multiples of 2^-9, the spacing of the codes below 2^-6, in the low bits.
    denormal = _bits(_float(magnitude) + 16384.0) - _bits(jnp.float32(16384))
    code = jnp.where(magnitude < _bits(jnp.float32(2.0**-6)), denormal, normal)
    return (code | ((sign >> 24) & 0x80)).astype(jnp.uint8)
