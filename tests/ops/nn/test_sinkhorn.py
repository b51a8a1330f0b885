"""The native form against the rule in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.sinkhorn import sinkhorn


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_rule(iterations, rng):
    x = rng.uniform(1e-3, 1.0, size=(7, 4, 4)).astype(np.float32)
    expected = x.astype(np.float64)
    for i in range(iterations):
        if i:
            expected = expected / (expected.sum(axis=2, keepdims=True) + 1e-6)
        expected = expected / (expected.sum(axis=1, keepdims=True) + 1e-6)
    got = jax.jit(lambda x: sinkhorn(x, iterations=iterations, eps=1e-6))(jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (np.abs(np.asarray(got).sum(axis=1) - 1) < 1e-4).all()
