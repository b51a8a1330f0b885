"""The FP8 record against numpy and ml_dtypes, bit for bit, on whatever device JAX uses."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.formats.fp8 import decode_e4m3, dequantise_fp8, encode_e4m3, quantise_fp8, to_bf16

pytestmark = pytest.mark.optimised

E4M3 = ml_dtypes.float8_e4m3fn
FLOOR = np.float32(1e-4)


def bits(x):
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


def expected_record(x):
    """The rule in numpy: (..., n) -> codes, inv_scale."""
    x = np.asarray(x).astype(np.float32)
    finite = np.isfinite(x).all(-1)
    x = np.where(finite[..., None], x, np.float32(0))
    inv_scale = np.maximum(np.abs(x).max(-1), FLOOR) / np.float32(448)
    codes = np.clip(x / inv_scale[..., None], -448, 448).astype(E4M3).view(np.uint8)
    return np.where(finite[..., None], codes, np.uint8(0x7F)), np.where(finite, inv_scale, np.float32(np.nan))


def assert_record(x, quantise=jax.jit(quantise_fp8)):  # noqa: B008
    codes, inv_scale = quantise(jnp.asarray(x))
    expected_codes, expected_scale = expected_record(x)
    np.testing.assert_array_equal(bits(inv_scale), bits(expected_scale))
    np.testing.assert_array_equal(np.asarray(codes), expected_codes)


def rows(rng, count, width=448):
    """Rows of magnitudes from far below the floor to near the largest float."""
    scale = 10.0 ** rng.uniform(-12, 36, (count, 1))
    return (rng.standard_normal((count, width)) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_records_are_the_rule_bit_for_bit(rng, dtype):
    assert_record(rows(rng, 4000).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_quotients_on_midpoints_of_codes_round_to_even(rng, dtype):
    # With amax 7 the scale is 1 / 64, and the quotients are integers.
    x = (rng.integers(-448, 449, (500, 448)) / 64).astype(dtype)
    x[:, 0] = 7
    halfway = bits(x.astype(np.float32) * 64) & np.uint32(0xFFFFF) == 0x80000
    assert np.mean(halfway) > 0.05
    assert_record(x)


def test_scale_is_the_correctly_rounded_quotient(rng):
    amax = np.concatenate(
        [
            rng.integers(bits(FLOOR), 0x7F800000, 1 << 20, dtype=np.uint32),
            np.arange(-40, 41) + int(bits(np.float32(7.0))),  # around the carry into the next binade
            [bits(FLOOR) - 1, bits(FLOOR), bits(FLOOR) + 1, 0x7F7FFFFF],
        ]
    )
    x = amax.astype(np.uint32).view(np.float32)
    inv_scale = jax.jit(quantise_fp8)(x[:, None])[1]
    np.testing.assert_array_equal(bits(inv_scale), bits(np.maximum(x, FLOOR) / np.float32(448)))


def test_any_leading_shape(rng):
    x = rows(rng, 24, 32)
    codes, inv_scale = jax.jit(quantise_fp8)(x.reshape(2, 3, 4, 32))
    assert codes.shape == (2, 3, 4, 32)
    assert inv_scale.shape == (2, 3, 4)
    np.testing.assert_array_equal(np.asarray(codes).reshape(24, 32), expected_record(x)[0])
    assert_record(x[0])


def test_without_jit(rng):
    assert_record(rows(rng, 24, 32), quantise_fp8)


def test_zeros_keep_their_sign_and_denormals_become_zero():
    x = np.array([[0.0, -0.0, 1e-40, -1e-40, 1e-12, -1e-12, 0.0, 0.0]], np.float32)
    codes, inv_scale = jax.jit(quantise_fp8)(x)
    assert np.asarray(codes).tolist() == [[0, 0x80, 0, 0x80, 0, 0x80, 0, 0]]
    assert inv_scale == FLOOR / np.float32(448)
    x[0, 7] = -448  # now the same values beside a large one
    assert_record(x)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_row_with_a_non_finite_value_reads_back_as_nan_and_spoils_no_other(rng, bad, dtype):
    x = rows(rng, 3).astype(dtype)
    x[1, 200] = bad
    codes, inv_scale = jax.jit(quantise_fp8)(x)
    assert (np.asarray(codes)[1] == 0x7F).all()
    assert bits(inv_scale)[1] == 0x7FC00000
    assert np.isnan(dequantise_fp8(codes, inv_scale)[1]).all()
    assert_record(x)


def test_encode_is_right_at_every_boundary_between_codes():
    # Encoding is monotonic, so the floats next to each boundary decide it for all floats.
    values = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    boundary = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([np.nextafter(boundary, 0), boundary, np.nextafter(boundary, 1000), values])
    x = np.concatenate([points, -points]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(encode_e4m3)(x)), x.astype(E4M3).view(np.uint8))


def test_encode_of_any_float_is_monotonic_clamped_and_marks_nan(rng):
    any_bits = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    x = any_bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = np.clip(x, -448, 448).astype(E4M3).view(np.uint8)
    expected = np.where(np.isnan(x), np.uint8(0x7F), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(encode_e4m3)(x)), expected)


def test_decode_of_every_code():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(E4M3).astype(np.float32)
    decoded = np.asarray(jax.jit(decode_e4m3)(codes))
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded)[:0xFF], np.signbit(expected)[:0xFF])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantise_is_one_product_then_a_cast(rng, dtype):
    codes = rng.integers(0, 256, (50, 448), dtype=np.uint8)
    inv_scale = (10.0 ** rng.uniform(-6, 30, 50)).astype(np.float32)
    expected = codes.view(E4M3).astype(np.float32) * inv_scale[:, None]
    value = dequantise_fp8(jnp.asarray(codes), jnp.asarray(inv_scale), dtype)
    assert value.dtype == dtype
    np.testing.assert_array_equal(np.asarray(value).astype(np.float32), expected.astype(dtype).astype(np.float32))


def test_to_bf16_rounds_like_numpy_keeps_denormals_and_has_one_nan(rng):
    x = np.concatenate(
        [
            rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32),
            np.array([0, 1 << 31, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7F7FFFFF, 0x7F800000, 0xFF800000], np.uint32),
            np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF], np.uint32),
        ]
    ).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isnan(x), np.uint16(0x7FC0), bits(x.astype(ml_dtypes.bfloat16)))
    np.testing.assert_array_equal(bits(jax.jit(to_bf16)(x)), expected)


def test_to_bf16_of_bf16_changes_only_nan():
    every = np.arange(1 << 16, dtype=np.uint16)
    x = every.view(ml_dtypes.bfloat16)
    expected = np.where(every & 0x7FFF > 0x7F80, np.uint16(0x7FC0), every)
    np.testing.assert_array_equal(bits(jax.jit(to_bf16)(x)), expected)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="quantise_fp8: got float16; expected float32 or bfloat16"):
        quantise_fp8(jnp.zeros((2, 8), jnp.float16))
    with pytest.raises(ValueError, match=r"quantise_fp8: got shape \(2, 0\)"):
        quantise_fp8(jnp.zeros((2, 0)))
    with pytest.raises(TypeError, match="got codes int8 and inv_scale float32; expected uint8 and float32"):
        dequantise_fp8(jnp.zeros((2, 8), jnp.int8), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"got codes \(2, 8\) and inv_scale \(8,\)"):
        dequantise_fp8(jnp.zeros((2, 8), jnp.uint8), jnp.zeros(8))
    with pytest.raises(TypeError, match="to_bf16: got int32"):
        to_bf16(jnp.zeros(2, jnp.int32))


def nearest_float(x):
    """The float32 nearest to a fraction, as a fraction, ties to even; exponents are unbounded."""
    unit = Fraction(2) ** (x.numerator.bit_length() - x.denominator.bit_length() - 24)
    while abs(x) >= unit * 2**24:
        unit *= 2
    return round(x / unit) * unit  # round() takes ties to even


def test_the_gpu_division_never_moves_a_code():
    """The three operations of cuda/quantise_warp.cuh against the correctly rounded quotient, wherever they may differ.

    With y the float nearest to 1 / s, the value they round last is within 2^-22 ulp of a / s. So they can differ from
    the correctly rounded quotient only where a / s is as near to a midpoint of two floats; and that can change a code
    only where the midpoint is beside a boundary between codes, whose mantissa b is a multiple of 2^19. As integers of
    24 bits, |a * 2^k - s * (b ± 1/2)| <= s * 2^-22 <= 4 (± 1/4 below a power of two), so s is within 16 of a multiple
    of 2^20: few enough to try them all, with a margin.
    """
    tried = 0
    for s in (j * 2**20 + d for j in range(8, 17) for d in range(-20, 21)):
        if not 2**23 <= s < 2**24:
            continue
        y = nearest_float(Fraction(1, s))
        for b in range(16 * 2**19, 32 * 2**19, 2**19):
            for beside in (Fraction(1, 2), Fraction(-1, 4) if b == 2**23 else Fraction(-1, 2)):
                for k in (22, 23, 24, 25):
                    a = round(s * (b + beside) / 2**k)
                    if not 2**23 <= a < 2**24 or abs(a * 2**k - s * (b + beside)) > 20:
                        continue
                    tried += 1
                    quotient = nearest_float(a * y)
                    excess = nearest_float(quotient * s - a) if quotient * s != a else 0
                    quotient = nearest_float(quotient - excess * y)
                    boundary, exact = Fraction(b, 2**k), nearest_float(Fraction(a, s))
                    assert (quotient > boundary) - (quotient < boundary) == (exact > boundary) - (exact < boundary)
    assert tried > 300
