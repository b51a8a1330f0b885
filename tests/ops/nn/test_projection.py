"""Products with block-scaled FP8 weights: each implementation against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.nn.projection import BlockScaledWeight, project, project_each, project_groups

LIMIT = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}
# A native form runs where the arrays are.
NATIVE = [*({"cuda" if jax.default_backend() == "gpu" else "cpu"} & dispatch.available())]


def random_weight(rng, rows, columns):
    """A weight as stored, and its values in float64."""
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38  # no NaN
    scale = rng.integers(110, 125, (-(-rows // 128), -(-columns // 128))).astype(np.uint8)
    scales = np.repeat(np.repeat(2.0 ** (scale.astype(np.float64) - 127), 128, 0)[:rows], 128, 1)[:, :columns]
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
    return BlockScaledWeight(jnp.asarray(codes), jnp.asarray(scale)), values


def error(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("implementation", ["jnp", *NATIVE])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 130, 200), (7, 512, 512), (64, 96, 1024)])
def test_project(tokens, rows, columns, implementation, dtype, rng):
    if implementation == "cuda" and (dtype == jnp.float32 or rows % 256):
        pytest.skip("not on CUDA")
    weight, values = random_weight(rng, rows, columns)
    x = jnp.asarray(rng.normal(size=(tokens, columns)) * 2.0 ** rng.integers(-9, 9, (tokens, 1)), dtype)
    got = jax.jit(lambda x, w: project(x, w, implementation=implementation))(x, weight)
    assert got.dtype == dtype
    assert got.shape == (tokens, rows)
    assert error(got, np.asarray(x, np.float64) @ values.T) < LIMIT[dtype]


@pytest.mark.parametrize("implementation", ["jnp", *NATIVE])
@pytest.mark.parametrize("tokens", [1, 7, 64, 70, 600])
def test_several_weights_of_one_input(tokens, implementation, rng):
    if implementation != "cuda" and tokens > 7:
        pytest.skip("a size for kernels of many tokens")
    rows = (512, 256, 768, 256)
    weights, values = zip(*(random_weight(rng, n, 512) for n in rows), strict=True)
    x = jnp.asarray(rng.normal(size=(tokens, 512)), jnp.bfloat16)
    got = jax.jit(lambda x, w: project_each(x, w, implementation=implementation))(x, weights)
    for y, of, n in zip(got, values, rows, strict=True):
        assert y.shape == (tokens, n)
        assert error(y, np.asarray(x, np.float64) @ of.T) < 2e-3


@pytest.mark.parametrize("implementation", ["jnp", *NATIVE])
def test_groups(implementation, rng):
    rows = 512 if implementation == "cuda" else 96
    weight, values = random_weight(rng, 2 * rows, 512)
    x = jnp.asarray(rng.normal(size=(3, 30 if implementation == "cuda" else 5, 2, 512)), jnp.bfloat16)
    got = jax.jit(lambda x, w: project_groups(x, w, implementation=implementation))(x, weight)
    expected = np.einsum("abgk,gnk->abgn", np.asarray(x, np.float64), values.reshape(2, rows, 512))
    assert got.shape == expected.shape
    assert error(got, expected) < 2e-3


@pytest.mark.parametrize("implementation", ["jnp", *NATIVE])
def test_alone_or_in_company(implementation, rng):
    weight, _ = random_weight(rng, 256, 512)
    x = jnp.asarray(rng.normal(size=(9, 512)), jnp.bfloat16)
    run = jax.jit(lambda x, w: project(x, w, implementation=implementation))
    whole = run(x, weight)
    other = run(x.at[:4].set(jnp.nan).at[5:].multiply(jnp.bfloat16(1e6)), weight)
    np.testing.assert_array_equal(whole[4].view(jnp.uint16), other[4].view(jnp.uint16))
    assert bool(jnp.isnan(other[:4]).all())


def test_shapes_are_checked(rng):
    weight, _ = random_weight(rng, 256, 256)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., K\)"):
        project(jnp.zeros((2, 128), jnp.bfloat16), weight)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., G, K\)"):
        project_groups(jnp.zeros((2, 3, 256), jnp.bfloat16), weight)
    with pytest.raises(ValueError, match=r"a scale of shape \(2, 2\)"):
        project(jnp.zeros((2, 256), jnp.bfloat16), weight._replace(scale=weight.scale[:1]))
    with pytest.raises(ValueError, match="float16"):
        project(jnp.zeros((2, 256), jnp.float16), weight)
