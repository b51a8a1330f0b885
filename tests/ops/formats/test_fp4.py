"""FP4 keys: bits against a slow, plain reading of the rules."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.formats.fp4 import GROUP_SIZE, dequantise_fp4, hadamard, hadamard_matrix, quantise_fp4

pytestmark = pytest.mark.optimised

FORMATS = sorted(GROUP_SIZE)
quantise, dequantise = jax.jit(quantise_fp4, static_argnums=1), jax.jit(dequantise_fp4, static_argnums=2)
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def reference(x, format):
    """codes (n,) 0..15 and scale values (groups,) of x (n,) float32, in exact arithmetic (float64 suffices)."""
    group, codes, scales = GROUP_SIZE[format], [], []
    for part in x.reshape(-1, group):
        amax = np.maximum(np.abs(part).max(), np.float32(1e-4))
        if format == "nvfp4":
            scale = float(np.float32(amax / np.float32(6)).astype(ml_dtypes.float8_e4m3fn)) if amax / 6 < 448 else 448.0
            scale = max(scale, 2.0**-9)
        else:
            scale = 2.0 ** np.ceil(np.log2(float(amax) / 6.0))
        scales.append(scale)
        v = part.astype(np.float64) / scale
        distance = np.abs(VALUES - np.abs(v)[:, None])
        best = distance == distance.min(axis=1, keepdims=True)
        even = np.arange(8) % 2 == 0
        best &= even | (best.sum(axis=1, keepdims=True) == 1)  # a tie goes to the even code
        codes.append(best.argmax(axis=1) + 8 * np.signbit(v))
    return np.concatenate(codes), np.array(scales)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 0.1, 1.0, 6.0, 448.0, 1e4])
def test_bits(format, magnitude, rng):
    x = (rng.normal(size=2048) * magnitude).astype(np.float32)
    x[:64] = 0.0
    x[5] = -0.0
    codes, scale = quantise(jnp.asarray(x), format)
    expected, scales = reference(x, format)
    np.testing.assert_array_equal(codes, expected[0::2] | (expected[1::2] << 4))
    value = np.where(expected > 7, -1.0, 1.0) * VALUES[expected & 7] * np.repeat(scales, GROUP_SIZE[format])
    back = dequantise(codes, scale, format)
    np.testing.assert_array_equal(back, value.astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_ties_go_to_the_even_code(format):
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    x = np.resize(np.concatenate([ties, -ties]), 32)
    codes, _ = map(np.asarray, quantise(jnp.asarray(x), format))  # amax 6: the scale is 1
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    even = [0, 2, 2, 4, 4, 6, 6, 7]
    np.testing.assert_array_equal(nibbles[:16], even + [c + 8 for c in even])


def test_scale_on_a_tie_goes_to_the_even_code():
    """amax / 6 halfway between two E4M3 values: a multiplication by the rounded 1 / 6 would land beside it."""
    halves = np.array([1 + (2 * k + 1) / 16 for k in range(8)]) * 2.0 ** np.arange(-6, 2).reshape(-1, 1)
    amax = (6 * halves).reshape(-1, 1).astype(np.float32)
    x = np.concatenate([amax, np.zeros((len(amax), 15), np.float32)], axis=1)
    _, scale = quantise(jnp.asarray(x), "nvfp4")
    np.testing.assert_array_equal(scale[:, 0], halves.reshape(-1).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("amax", [6.0, 6.0000005, 12.0, 11.999999, 3.0, 4.0, 4.5, 8.0, 1e-3])
def test_power_of_two_scale_is_the_smallest_that_holds_amax(amax):
    x = np.zeros(32, np.float32)
    x[3] = amax
    _, scale = quantise_fp4(jnp.asarray(x), "mxfp4")
    value = 2.0 ** (int(scale[0]) - 127)
    assert value * 6 >= x[3] > value / 2 * 6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_reads_back_as_nan(format, bad):
    group = GROUP_SIZE[format]
    x = np.full(4 * group, 6.0, np.float32)
    x[group + 3] = bad
    back = np.asarray(dequantise(*quantise(jnp.asarray(x), format), format)).reshape(4, group)
    assert np.isnan(back[1]).all()
    np.testing.assert_array_equal(back[[0, 2, 3]], 6.0)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiple of 16 values, got 24"):
        quantise_fp4(jnp.ones(24), "nvfp4")
    with pytest.raises(ValueError, match="'fp4' is not known"):
        quantise_fp4(jnp.ones(32), "fp4")


def test_hadamard_leaves_scores_alone(rng):
    q, k = (jnp.asarray(rng.normal(size=(8, 128)), jnp.float32) for _ in range(2))
    matrix = hadamard_matrix(128).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(128), atol=1e-6)
    np.testing.assert_allclose(jnp.sum(hadamard(q) * hadamard(k), -1), jnp.sum(q * k, -1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="power of two, got 96"):
        hadamard_matrix(96)
