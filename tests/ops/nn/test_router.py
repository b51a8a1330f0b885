"""The choice of experts against the rule in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.router import MOST_EXPERTS, ByScore, ByToken, choose_experts, route

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


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("tokens", "columns", "experts", "k"), [(1, 4096, 256, 6), (9, 512, 128, 6), (5, 1024, 384, 8), (32, 256, 512, 32)]
)
@pytest.mark.parametrize("hashed", [False, True])
def test_from_activations(tokens, columns, experts, k, hashed, implementation, rng):
    x = jnp.asarray(rng.normal(size=(tokens, columns)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(experts, columns)) * 3 * columns**-0.5, jnp.bfloat16)
    exact = scores(np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T)
    if hashed:
        table = np.argsort(rng.random((100, experts)), axis=1)[:, :k].astype(np.int32)
        ids = rng.integers(0, 100, tokens).astype(np.int32)
        rule, wanted = ByToken(jnp.asarray(table), jnp.asarray(ids)), table[ids]
    else:
        bias = jnp.asarray(rng.normal(size=experts) * 0.1, jnp.float32)
        rule, wanted = ByScore(bias), np.argsort(-(exact + np.asarray(bias, np.float64)), axis=1)[:, :k]
    slots = np.arange(tokens, dtype=np.int32)
    slots[2::5] = -1

    def call(x, rule, slots):
        return route(x, weight, rule, k=k, scaling=2.5, slots=slots, implementation=implementation)

    picks, weights = jax.jit(call)(x, rule, jnp.asarray(slots))
    share = np.take_along_axis(exact, wanted, axis=1)
    share = 2.5 * share / share.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(picks, np.where(slots[:, None] < 0, -1, wanted))
    np.testing.assert_allclose(weights, np.where(slots[:, None] < 0, 0, share), rtol=1e-4)
    if implementation == "cuda":  # of more tokens XLA computes logits
        more, _ = jax.jit(lambda x: route(x, weight, ByScore(jnp.zeros(experts)), k=k, scaling=2.5))(
            jnp.concatenate([x] * 65)
        )
        np.testing.assert_array_equal(more[:tokens], more[-tokens:])


def test_what_route_does_not_take(rng):
    x, weight = jnp.zeros((2, 32)), jnp.zeros((8, 16))
    with pytest.raises(ValueError, match="expected one dtype"):
        route(x, weight, ByScore(jnp.zeros(8)), k=2, scaling=1.0)
    with pytest.raises(ValueError, match="implementation 'cuda' cannot be used"):
        route(x[:, :16], weight, ByScore(jnp.zeros(8)), k=2, scaling=1.0, implementation="cuda")
