"""The two released weight formats against their definitions, written out here a second time."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.model.files.weight_formats import dequantise, quantise, scale_shape

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(byte):
    """The value of an E4M3 byte: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.nan if byte & 127 == 127 else value
    return -value if byte & 128 else value


def e8m0(byte):
    return 2.0 ** (float(byte) - 127)


def plain(form, codes, scales):
    """Value times scale, one by one, in float64."""
    codes, scales = codes.view(np.uint8), scales.view(np.uint8)
    if form == "fp8":
        return np.array(
            [
                [e4m3(int(c)) * e8m0(scales[i // 128, j // 128]) for j, c in enumerate(row)]
                for i, row in enumerate(codes)
            ]
        )
    signed = E2M1 + [-v for v in E2M1]
    rows = [[signed[n] for c in row for n in (int(c) & 15, int(c) >> 4)] for row in codes]
    return np.array([[v * e8m0(scales[i, j // 32]) for j, v in enumerate(row)] for i, row in enumerate(rows)])


def read(form, codes, scales, shape, dtype=np.float32):
    out = np.full(shape, 7, dtype)
    dequantise(form, codes, scales, out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_every_code_and_scales_of_all_sizes_read_back_exactly(form, dtype):
    shape = (140, 256)
    codes = np.arange(140 * 256 if form == "fp8" else 140 * 128).astype(np.uint8).reshape(140, -1)
    if form == "fp8":
        codes[codes & 127 == 127] = 0  # NaN is no number to compare
    rng = np.random.default_rng(5)
    scales = rng.integers(27, 227, scale_shape(form, shape), dtype=np.uint8)
    got = read(form, codes, scales.view(ml_dtypes.float8_e8m0fnu), shape, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float64), plain(form, codes, scales))


def test_float32_scales_and_codes_of_any_type():
    codes = np.full((2, 64), 0x38, np.uint8)  # E4M3 of 1
    got = read("fp8", codes.view(ml_dtypes.float8_e4m3fn), np.float32([[0.3]]), (2, 64))
    np.testing.assert_array_equal(got, np.full((2, 64), 0.3, np.float32))
    got = read("fp4", codes.view(np.int8), np.float32([[1, 2, 3, 4]] * 2), (2, 128))
    np.testing.assert_array_equal(got[:, ::2], np.zeros((2, 64)))  # the low nibble, 8, is -0
    np.testing.assert_array_equal(got[0, 1::32], [1.5, 3.0, 4.5, 6.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_a_scale_that_is_no_number_is_named(bad):
    scales = np.ones((2, 3), np.float32)
    scales[1, 2] = bad
    with pytest.raises(
        ValueError, match=r"scale \[1, 2\] is (nan|-?inf|9.99.*e\+37|1e\+38): expected a number of at most"
    ):
        read("fp8", np.zeros((256, 384), np.uint8), scales, (256, 384))


@pytest.mark.parametrize(("form", "largest"), [("fp8", 448.0), ("fp4", 6.0)])
def test_quantising_takes_the_nearest_value_under_the_smallest_scale(form, largest, rng):
    shape = (130, 160)
    weight = (rng.standard_normal(shape) * np.exp2(rng.integers(-20, 20, shape))).astype(np.float32)
    weight[3, 32:64] = 0
    weight[0, :4] = [largest, -largest, 0.0, -0.0]
    codes, scales = quantise(form, weight)
    assert codes.dtype == (ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8)
    assert scales.dtype == ml_dtypes.float8_e8m0fnu
    block = (128, 128) if form == "fp8" else (1, 32)
    every = np.array([e4m3(b) for b in range(256) if b & 127 != 127] if form == "fp8" else E2M1 + [-v for v in E2M1])
    got = read(form, codes, scales, shape).astype(np.float64)
    for i in range(0, 130, block[0]):
        for j in range(0, 160, block[1]):
            part = np.s_[i : i + block[0], j : j + block[1]]
            scale, amax = e8m0(scales.view(np.uint8)[i // block[0], j // block[1]]), np.abs(weight[part]).max()
            if amax == 0:
                assert scale == 1
                continue
            assert amax <= largest * scale
            assert amax > largest * scale / 2
            grid = np.sort(np.unique(every)) * scale
            values = weight[part].astype(np.float64).reshape(-1)
            nearest = np.abs(values[:, None] - grid).min(axis=1)
            np.testing.assert_array_equal(np.abs(got[part].reshape(-1) - values), nearest)


def test_ties_go_to_the_even_code():
    midpoints = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)[None]
    codes, _ = quantise("fp4", midpoints)
    nibbles = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(-1)
    np.testing.assert_array_equal(nibbles[:8], [0, 2, 2, 4, 4, 6, 6, 7])


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_what_the_format_holds_comes_back_bit_for_bit(form, rng):
    shape = (256, 192)
    codes = rng.integers(0, 256, (256, 192 if form == "fp8" else 96), dtype=np.uint8)
    if form == "fp8":
        codes[codes & 127 == 127] = 0x7E
        codes[::128, ::128] = 0x7E  # the largest value, so that the scale is the smallest that fits
    else:
        codes[:, ::16] = 0x77
    scales = rng.integers(100, 150, scale_shape(form, shape), dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    again, same = quantise(form, read(form, codes, scales, shape))
    assert again.tobytes() == codes.tobytes()
    assert same.tobytes() == scales.tobytes()


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_the_largest_and_the_smallest_numbers(form):
    for value in (2.0**127, 2.0**-120, 2.0**-126):
        weight = np.full((1, 32), value, np.float32)
        np.testing.assert_array_equal(read(form, *quantise(form, weight), (1, 32)), weight)
    for value in (1e-45, 2.0**-140):  # below what a scale of 2^-127 reaches, the error stays below that
        weight = np.full((1, 32), value, np.float32)
        assert np.abs(read(form, *quantise(form, weight), (1, 32)) - weight).max() <= 2.0**-128


def test_what_cannot_be_quantised_is_named():
    weight = np.ones((200, 64), np.float32)
    weight[150, 7] = np.inf
    for form in ("fp8", "fp4"):
        with pytest.raises(ValueError, match=r"\[150, 7\] is inf: expected a number of at most 1.7e"):
            quantise(form, weight)
    with pytest.raises(ValueError, match="expected a multiple of 32 columns"):
        quantise("fp4", weight[:, :40])
