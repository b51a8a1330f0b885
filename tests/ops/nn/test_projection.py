"""Products with block-scaled FP8 weights: each implementation against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.nn.projection import (
    BlockScaledWeight,
    Gated,
    Normed,
    project,
    project_each,
    project_groups,
    project_through,
)

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


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("implementation", ["jnp", *NATIVE])
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 70])
@pytest.mark.parametrize("kind", ["norm", "swiglu"])
def test_what_becomes_of_x_before(kind, tokens, implementation, dtype, rng):
    if implementation == "cuda" and dtype == jnp.float32:
        pytest.skip("not on CUDA")
    if implementation != "cuda" and tokens > 2:
        pytest.skip("a size for kernels of some tokens")
    columns = 1024
    weight, values = random_weight(rng, 512, columns)
    x = jnp.asarray(rng.normal(size=(tokens, columns)) * 2.0 ** rng.integers(-3, 3, (tokens, 1)), dtype)
    exact = np.asarray(x, np.float64)
    if kind == "norm":
        before = Normed(jnp.asarray(rng.uniform(0.5, 2, columns), jnp.float32), 1e-6)
        exact = exact / np.sqrt(np.mean(exact**2, axis=1, keepdims=True) + 1e-6) * np.asarray(before.weight, np.float64)
    else:
        before = Gated(jnp.asarray(rng.normal(size=(tokens, columns)) * 3, dtype), 2.0)
        gate, up = np.minimum(exact, 2.0), np.clip(np.asarray(before.up, np.float64), -2.0, 2.0)
        exact = gate / (1 + np.exp(-gate)) * up
    got = jax.jit(
        lambda x, array, w: project(x, w, before=type(before)(array, before[1]), implementation=implementation)
    )(x, before[0], weight)
    # What is multiplied is of x's dtype.
    rounded = np.asarray(jnp.asarray(exact.astype(np.float32), dtype), np.float64)
    assert error(got, rounded @ values.T) < LIMIT[dtype]


@pytest.mark.parametrize("implementation", ["jnp", None])
@pytest.mark.parametrize(
    ("tokens", "groups", "columns"), [(1, 1, 512), (2, 2, 512), (7, 1, 1024), (1, 1, 8192), (33, 2, 1024), (40, 1, 512)]
)
def test_a_product_of_a_product(tokens, groups, columns, implementation, rng):
    if implementation is None and columns > 1024 and jax.default_backend() != "gpu":
        pytest.skip("a size for kernels that share the columns")
    rows = (512 * groups, 256) if groups == 1 else (512 * groups,)
    firsts, values = zip(*(random_weight(rng, n, columns) for n in rows), strict=True)
    second, of_second = random_weight(rng, 256, rows[0])
    norm = Normed(jnp.asarray(rng.uniform(0.5, 2, rows[0]), jnp.float32), 1e-6) if groups == 1 else None
    x = jnp.asarray(rng.normal(size=(tokens, groups, columns)), jnp.bfloat16)

    def run(x, firsts, second, array):
        norm = None if array is None else Normed(array, 1e-6)
        return project_through(x, firsts, second, norm=norm, implementation=implementation)

    # In one program XLA may norm a first result that it has not rounded.
    limit = 4e-3 if implementation == "jnp" else 2e-3
    *got, last = jax.jit(run)(x, firsts, second, norm and norm.weight)
    for y, of in zip(got, values, strict=True):
        exact = np.einsum("tgk,gnk->tgn", np.asarray(x, np.float64), of.reshape(groups, -1, columns))
        assert error(y, exact.reshape(tokens, -1)) < 2e-3
    low = np.asarray(got[0], np.float64)  # as it was stored
    if norm:
        low = low / np.sqrt(np.mean(low**2, axis=1, keepdims=True) + 1e-6) * np.asarray(norm.weight, np.float64)
        low = np.asarray(jnp.asarray(low.astype(np.float32), jnp.bfloat16), np.float64)
    assert error(last, low @ of_second.T) < limit


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
    with pytest.raises(ValueError, match=r"expected float32 \(256,\)"):
        project(jnp.zeros((2, 256)), weight, before=Normed(jnp.zeros(2), 1e-6))
    with pytest.raises(ValueError, match="as x"):
        project(jnp.zeros((2, 256)), weight, before=Gated(jnp.zeros((1, 256)), 1.0))
    several, narrow = (weight, weight), jnp.zeros((2, 1, 255), jnp.bfloat16)
    x = jnp.zeros((2, 1, 256), jnp.bfloat16)
    for given, firsts in [
        (x[:, 0], several),
        (x, ()),
        (narrow, several),
        (jnp.zeros((2, 3, 256), jnp.bfloat16), (weight,)),
        (jnp.zeros((2, 2, 256), jnp.bfloat16), several),
    ]:
        with pytest.raises(ValueError, match=r"project_through: x has shape \(2, .*expected \(T, G, K\)"):
            project_through(given, firsts, weight)
    with pytest.raises(ValueError, match=r"second weight has shape \(256, 255\), expected \(M, 256\)"):
        project_through(x, several, weight._replace(codes=weight.codes[:, 1:]))
    with pytest.raises(ValueError, match=r"norm's weight is bfloat16 \(256,\), expected float32"):
        project_through(x, several, weight, norm=Normed(jnp.zeros(256, jnp.bfloat16), 1e-6))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., G, K\)"):
        project_groups(jnp.zeros((2, 0, 256), jnp.bfloat16), weight)


@pytest.mark.parametrize("implementation", ["jnp", None])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 256, 512), (3, 0, 512), (3, 256, 0)])
def test_sizes_of_nothing(tokens, rows, columns, implementation, rng):
    """No tokens, no rows, or a sum of no columns."""
    weight, _ = random_weight(rng, rows, columns)
    x = jnp.ones((tokens, columns))
    (y,) = project_each(x, (weight,), implementation=implementation)
    np.testing.assert_array_equal(y, np.zeros((tokens, rows), np.float32))
    x = jnp.ones((tokens, 2, columns))
    np.testing.assert_array_equal(
        project_groups(x, weight, implementation=implementation), np.zeros((tokens, 2, rows // 2), np.float32)
    )
    through = project_through(x[:, :1], (weight,), BlockScaledWeight(weight.codes[:, :0].T, weight.scale[:, :0].T))
    assert [y.shape for y in through] == [(tokens, rows), (tokens, 0)]
