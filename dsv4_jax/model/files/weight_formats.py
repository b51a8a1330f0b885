"""The released weights' two storage formats, on the host: what files hold <-> numbers.

"fp8" is E4M3 with a scale per block of 128x128, "fp4" is E2M1, two values a byte (the even column in the low four
bits), with a scale per 32 values of a row. Scales are powers of two (E8M0: 2^(byte - 127)). Both formats read back
exactly in bfloat16 and float32: no value has more than 4 significant bits.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 128
"""Rows and columns that share a scale of "fp8"."""
GROUP = 32
"""Values of a row that share a scale of "fp4"."""

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NIBBLE = np.concatenate([_E2M1, -_E2M1])
_PAIR = np.stack([_NIBBLE[np.arange(256) & 15], _NIBBLE[np.arange(256) >> 4]], axis=-1)
_E8M0_BIAS = 127
# Up to here nothing overflows in float32 or bfloat16: 448 * 2^119 and 6 * 2^125 are below 2^128.
_MAX = 2.0**127
_MAX_SCALE = {"fp8": 2.0**119, "fp4": 2.0**125}


def scale_shape(form: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight of `shape` (out, in) stored as "fp8" or "fp4".

    Raises:
      ValueError: "fp4" and a last size that is no multiple of 32.
    """
    rows, columns = shape
    if form == "fp8":
        return -(-rows // BLOCK), -(-columns // BLOCK)
    if columns % GROUP:
        raise ValueError(f"a weight of shape {shape} cannot be FP4: expected a multiple of {GROUP} columns")
    return rows, columns // GROUP


def form_of(dtype: str, stored: tuple[int, ...], shape: tuple[int, int]) -> str | None:
    """The form of a weight of `shape` that a file has in this type and shape: "fp8", "fp4", or None for neither.

    Some writers know no type of 8-bit floats, or of pairs of 4-bit ones, and tag them as integers of a byte.
    """
    if dtype == "U8":
        return "fp8" if stored == shape else "fp4"
    return {"F8_E4M3": "fp8", "I8": "fp4", "F4": "fp4"}.get(dtype)


def _scale_values(scales: np.ndarray) -> np.ndarray:
    """Scales as float32; integers of a byte are E8M0 by another tag."""
    if scales.dtype in (np.uint8, np.int8):
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)


def _stripes(rows: int) -> range:
    # Temporaries stay as small as 128 rows, whatever the size of the tensor.
    return range(0, rows, BLOCK)


def dequantise(form: str, codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Writes value * scale into `out` (out, in), float32 or bfloat16.

    Args:
      form: "fp8" or "fp4".
      codes: one byte each: (out, in) of E4M3, or (out, in / 2) of E2M1 pairs, whatever their dtype.
      scales: E8M0 (also as bytes), float32 or bfloat16, of `scale_shape`.

    Raises:
      ValueError: a scale that is not a number, or so large that values overflow.
    """
    scales = _scale_values(scales)
    _check_magnitudes(scales, _MAX_SCALE[form], "scale ", 0)
    codes = codes.view(np.uint8)
    rows, columns = out.shape
    for first in _stripes(rows):
        part = slice(first, min(first + BLOCK, rows))
        if form == "fp8":
            values = np.take(_E4M3, codes[part])
            values *= np.repeat(scales[first // BLOCK], BLOCK)[:columns]
        else:
            values = np.take(_PAIR, codes[part], axis=0).reshape(-1, columns // GROUP, GROUP)
            values *= scales[part, :, None]
        out[part] = values.reshape(-1, columns)


def scale_bytes(form: str, scales: np.ndarray) -> np.ndarray:
    """Scales as E8M0 bytes (uint8), for weights that stay as they are stored.

    Raises:
      ValueError: a scale that `dequantise` refuses, or that is no power of two.
    """
    values = _scale_values(scales)
    _check_magnitudes(values, _MAX_SCALE[form], "scale ", 0)
    if scales.dtype.itemsize == 1:
        return scales.view(np.uint8)
    mantissa, exponent = np.frexp(values)
    stored = exponent + (_E8M0_BIAS - 1)
    bad = (mantissa != 0.5) | (stored < 0)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"scale [{row}, {column}] is {values[row, column]}: expected a power of two from 2^-127 on; "
            "load with weights='bf16' or 'float32'"
        )
    return stored.astype(np.uint8)


def quantise(form: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest values `form` holds, under the smallest scales that let none overflow.

    A scale is 2^ceil(log2(amax / 448)) ("fp8") or 2^ceil(log2(amax / 6)) ("fp4") of its block; 1 where amax is 0.
    Values are rounded to nearest, ties to even.

    Args:
      form: "fp8" or "fp4".
      weight: (out, in) of float32, bfloat16 or float16.

    Returns:
      codes: (out, in) E4M3, or (out, in / 2) int8 of E2M1 pairs.
      scales: E8M0, of `scale_shape`.

    Raises:
      ValueError: a value that is not finite (or beyond 2^127), or a shape that `scale_shape` refuses.
    """
    rows, columns = weight.shape
    scales = np.empty(scale_shape(form, (rows, columns)), np.uint8)
    width = columns if form == "fp8" else columns // 2
    codes = np.empty((rows, width), np.uint8)
    for first in _stripes(rows):
        part = slice(first, min(first + BLOCK, rows))
        values = weight[part].astype(np.float32)
        _check_magnitudes(values, _MAX, "", first)
        if form == "fp8":
            amax = np.maximum.reduceat(np.abs(values).max(axis=0), range(0, columns, BLOCK))
            exponent = _scale_exponent(amax, 448.0)
            scales[first // BLOCK] = exponent + _E8M0_BIAS
            scaled = np.ldexp(values, -np.repeat(exponent, BLOCK)[:columns])
            codes[part] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        else:
            groups = values.reshape(-1, columns // GROUP, GROUP)
            exponent = _scale_exponent(np.abs(groups).max(axis=-1), 6.0)
            scales[part] = exponent + _E8M0_BIAS
            scaled = np.ldexp(groups, -exponent[..., None]).reshape(-1, columns)
            nibbles = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            codes[part] = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    stored: Any = ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8
    return codes.view(stored), scales.view(ml_dtypes.float8_e8m0fnu)


def _check_magnitudes(values: np.ndarray, largest: float, what: str, first_row: int) -> None:
    good = np.abs(values) <= np.float32(largest)  # false for NaN too
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise ValueError(
            f"{what}[{first_row + row}, {column}] is {values[row, column]}: expected a number of at most {largest:.3g}"
        )


def _scale_exponent(amax: np.ndarray, largest: float) -> np.ndarray:
    """ceil(log2(amax / largest)) as int32, exactly; 0 where amax is 0."""
    mantissa, exponent = np.frexp(amax)
    limit, above = np.frexp(np.float32(largest))
    exponent = exponent - above + (mantissa > limit)
    return np.where(amax == 0, 0, np.clip(exponent, -_E8M0_BIAS, _E8M0_BIAS)).astype(np.int32)
