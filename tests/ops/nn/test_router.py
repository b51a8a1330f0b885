"""The choice of experts against the rule in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.router import MOST_EXPERTS, ByScore, ByToken, choose_experts

FORMS = ["jnp", pytest.param("cuda", marks=pytest.mark.gpu)]


def scores(logits):
    return np.sqrt(np.logaddexp(0, np.asarray(logits, np.float64)))


def run(logits, rule, k, implementation, slots=None):
    def call(logits, rule, slots):
        return choose_experts(logits, rule, k=k, scaling=2.5, slots=slots, implementation=implementation)

    return jax.jit(call)(logits, rule, slots)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 256, 6), (70, 384, 6), (5, 33, 4), (3, MOST_EXPERTS, 32)])
def test_the_best_scores(tokens, experts, k, implementation, rng):
    logits = jnp.asarray(rng.normal(size=(tokens, experts)) * 4, jnp.float32)
    bias = jnp.asarray(rng.normal(size=experts) * 0.1, jnp.float32)
    picks, weights = run(logits, ByScore(bias), k, implementation)
    exact = scores(logits)
    wanted = np.argsort(-(exact + np.asarray(bias, np.float64)), axis=1)[:, :k]
    np.testing.assert_array_equal(picks, wanted)
    share = np.take_along_axis(exact, wanted, axis=1)
    np.testing.assert_allclose(weights, 2.5 * share / share.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_equal_scores_and_nan(implementation):
    logits = jnp.zeros((2, 64)).at[0, 40].set(jnp.nan).at[1, 50].set(1.0)
    picks, weights = run(logits, ByScore(jnp.zeros(64)), 3, implementation)
    np.testing.assert_array_equal(picks, [[40, 0, 1], [50, 0, 1]])
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[1]).all()


@pytest.mark.parametrize("implementation", FORMS)
def test_a_table(implementation, rng):
    logits = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    table = jnp.asarray(rng.integers(0, 64, (100, 3)), jnp.int32)
    ids = jnp.asarray([0, 99, 7, 7, 50], jnp.int32)
    picks, weights = run(logits, ByToken(table, ids), 3, implementation)
    np.testing.assert_array_equal(picks, table[ids])
    share = np.take_along_axis(scores(logits), np.asarray(picks), axis=1)
    np.testing.assert_allclose(weights, 2.5 * share / share.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_padding_takes_no_expert(implementation, rng):
    logits = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    slots = jnp.asarray([3, -1, 0, -1], jnp.int32)
    ids = jnp.asarray([1, 0, 2, 0], jnp.int32)
    table = jnp.asarray(rng.integers(0, 64, (3, 5)), jnp.int32)
    for rule in (ByScore(jnp.zeros(64)), ByToken(table, ids)):
        found = run(logits, rule, 5, implementation, slots=slots)
        for got, whole, padding in zip(found, run(logits, rule, 5, implementation), (-1, 0), strict=True):
            np.testing.assert_array_equal(got, np.where(slots[:, None] < 0, padding, whole))
