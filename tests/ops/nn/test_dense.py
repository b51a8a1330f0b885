"""Products with several bfloat16 weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.dense import multiply_each

FORMS = ["jnp", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(rng, tokens, columns, rows):
    x = jnp.asarray(rng.normal(size=(tokens, columns)), jnp.bfloat16)
    return x, [jnp.asarray(rng.normal(size=(n, columns)) * columns**-0.5, jnp.bfloat16) for n in rows]


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1024), (9, 4096), (17, 1024), (64, 7168)])
def test_products(tokens, columns, implementation, rng):
    if implementation == "jnp" and columns > 1024:
        pytest.skip("a size for the kernels")
    rows = (96, 32, 64)
    x, weights = inputs(rng, tokens, columns, rows)
    got = jax.jit(lambda *a: multiply_each(*a, implementation=implementation))(x, weights)
    # XLA:GPU may add up parts that it has rounded.
    limit = 4e-3 if implementation == "jnp" and jax.default_backend() == "gpu" else 2e-3
    for y, weight, n in zip(got, weights, rows, strict=True):
        assert y.shape == (tokens, n)
        assert y.dtype == jnp.bfloat16
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        assert np.linalg.norm(np.asarray(y, np.float64) - exact) < limit * np.linalg.norm(exact)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 64])
def test_a_token_does_not_depend_on_its_company_on_a_gpu(tokens, rng):
    x, weights = inputs(rng, tokens, 1024, (64, 32))
    run = jax.jit(lambda *a: multiply_each(*a, implementation="cuda"))
    for y, other in zip(run(x, weights), run(x.at[1:].set(jnp.nan), weights), strict=True):
        np.testing.assert_array_equal(np.asarray(y[0], np.float32), np.asarray(other[0], np.float32))


def test_what_does_not_fit(rng):
    x, weights = inputs(rng, 2, 64, (3, 5))
    with pytest.raises(ValueError, match="expected bfloat16"):
        multiply_each(x, [weights[0], weights[1][:, :32]])
    with pytest.raises(ValueError, match="implementation 'cuda' cannot be used"):
        multiply_each(x, weights, implementation="cuda")
