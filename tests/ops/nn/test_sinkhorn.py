"""Every form against the rule in float64, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.nn.sinkhorn import sinkhorn


@pytest.mark.parametrize("implementation", ["jnp", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("tokens", "streams", "iterations"), [(7, 4, 1), (7, 4, 2), (70, 4, 20), (5, 3, 20), (3, 1, 3)]
)
def test_rule(implementation, tokens, streams, iterations, rng):
    if implementation == "cpu" and implementation not in dispatch.available():
        pytest.skip("no native library")
    x = rng.uniform(1e-3, 1.0, size=(tokens, streams, streams)).astype(np.float32)
    expected = x.astype(np.float64)
    for i in range(iterations):
        if i:
            expected = expected / (expected.sum(axis=2, keepdims=True) + 1e-6)
        expected = expected / (expected.sum(axis=1, keepdims=True) + 1e-6)

    def run(x):
        return sinkhorn(x, iterations=iterations, eps=1e-6, implementation=implementation)

    with jax.default_device(jax.devices("gpu" if implementation == "cuda" else "cpu")[0]):
        got = np.asarray(jax.jit(run)(jnp.asarray(x)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (np.abs(got.sum(axis=1) - 1) < 1e-4).all()


@pytest.mark.gpu
def test_both_native_forms_give_the_same_bits(rng):
    x = rng.uniform(1e-3, 1.0, size=(130, 4, 4)).astype(np.float32)
    got = []
    for device, implementation in [("cpu", "cpu"), ("gpu", "cuda")]:
        with jax.default_device(jax.devices(device)[0]):
            got.append(sinkhorn(jnp.asarray(x), iterations=20, eps=1e-6, implementation=implementation))
    np.testing.assert_array_equal(*got)


@pytest.mark.gpu
def test_too_many_streams_for_a_warp_take_the_other_form(rng):
    x = jnp.asarray(rng.uniform(0.1, 1.0, size=(3, 6, 6)).astype(np.float32))
    np.testing.assert_allclose(np.asarray(sinkhorn(x, iterations=20, eps=1e-6)).sum(axis=1), 1, atol=1e-4)
    with pytest.raises(ValueError, match="6 streams; it takes up to 5"):
        sinkhorn(x, iterations=20, eps=1e-6, implementation="cuda")
