"""The 584-byte record: bits against a plain reading of the rule."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.formats.ue8m0 import dequantise_ue8m0, quantise_ue8m0, scale_bytes

pytestmark = pytest.mark.optimised

quantise, dequantise = jax.jit(quantise_ue8m0), jax.jit(dequantise_ue8m0)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 1e-2, 1.0, 448.0, 1e5, 1e30])
def test_bits(magnitude, rng):
    x = (rng.normal(size=(50, 448)) * magnitude).astype(np.float32)
    codes, scales = quantise(jnp.asarray(x))
    assert scales.shape == (50, 8)
    assert not scales[:, 7].any()
    groups = x.reshape(50, 7, 64)
    amax = np.maximum(np.abs(groups).max(axis=-1), np.float32(1e-4)).astype(np.float64)
    exponent = np.ceil(np.log2(amax / 448))
    np.testing.assert_array_equal(scales[:, :7], exponent + 127)
    scaled = (groups.astype(np.float64) / 2.0 ** exponent[..., None]).reshape(50, 448)
    expected = scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    back = expected.astype(np.float64).reshape(groups.shape) * 2.0 ** exponent[..., None]
    np.testing.assert_array_equal(dequantise(codes, scales), back.reshape(50, 448).astype(np.float32))


@pytest.mark.parametrize("exponent", range(-21, 40))
def test_edges_of_a_scale(exponent):
    """448 * 2^k needs scale 2^k, the next float 2^(k + 1)."""
    edge = np.float32(448 * 2.0 ** (exponent / 1))
    x = np.zeros((2, 64), np.float32)
    x[:, 5] = edge, np.nextafter(edge, np.float32(np.inf))
    _, scales = quantise_ue8m0(jnp.asarray(x))
    assert scales[:, 0].tolist() == [exponent + 127, exponent + 128]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_reads_back_as_nan(bad):
    x = np.full((1, 448), 448.0, np.float32)
    x[0, 70] = bad
    back = np.asarray(dequantise(*quantise(jnp.asarray(x))))[0].reshape(7, 64)
    assert np.isnan(back[1]).all()
    np.testing.assert_array_equal(np.delete(back, 1, axis=0), 448.0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0xFF800001])
def test_no_nan_is_lost_among_many_rows(bits, rng):
    """XLA:CPU's maximum of floats lost them, depending on the number of rows."""
    x = rng.normal(size=(12, 448)).astype(np.float32)
    at = np.arange(7) * 64 + np.arange(7) * 9
    x.view(np.uint32)[1, at] = bits
    _, scales = quantise(jnp.asarray(x))
    assert scales[1].tolist() == [0xFF] * 7 + [0]
    assert np.count_nonzero(np.asarray(scales) == 0xFF) == 7


def test_widths():
    assert [scale_bytes(448), scale_bytes(512), scale_bytes(576)] == [8, 8, 16]
    with pytest.raises(ValueError, match="multiple of 64 values without position, got 450"):
        scale_bytes(450)
