"""Routed experts with FP4 weights: each implementation against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.nn.experts import ExpertWeights, Fp4Weight, apply_experts

LIMIT = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}
NATIVE = "cuda" if jax.default_backend() == "gpu" else "cpu"  # a native form runs where the arrays are
IMPLEMENTATIONS = ["jnp", *({NATIVE} & dispatch.available())]
EXPERTS, K = 8, 3


def random_weight(rng, rows, columns):
    """A weight as stored, and its values in float64."""
    codes = rng.integers(0, 256, (EXPERTS, rows, columns // 2), dtype=np.uint8)
    scale = rng.integers(118, 123, (EXPERTS, rows, columns // 32)).astype(np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(EXPERTS, rows, columns)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values = values * np.repeat(2.0 ** (scale.astype(np.float64) - 127), 32, axis=-1)
    return Fp4Weight(jnp.asarray(codes), jnp.asarray(scale)), values


@pytest.fixture(scope="module")
def stored():
    """By implementation: weights, and their values; on CUDA of a size that it takes."""

    def make(hidden, inner):
        rng = np.random.default_rng(1)
        (w1, v1), (w2, v2), (w3, v3) = (
            random_weight(rng, *s) for s in ((inner, hidden), (hidden, inner), (inner, hidden))
        )
        return ExpertWeights(w1, w2, w3), (v1, v2, v3)

    return {name: make(512, 512) if name == "cuda" else make(160, 96) for name in IMPLEMENTATIONS}


def expected_of(x, picks, weights, values, limit):
    w1, w2, w3 = values
    out = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for e, share in zip(picks[t], weights[t], strict=True):
            if 0 <= e < EXPERTS:
                gate, up = np.minimum(w1[e] @ x[t], limit), np.clip(w3[e] @ x[t], -limit, limit)
                out[t] += share * (w2[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def picks_of(kind, tokens, rng):
    if kind == "one for all":
        return np.tile(np.array([[5, 0, 5]], np.int32), (tokens, 1))
    if kind == "some never":
        return rng.integers(2, 6, (tokens, K)).astype(np.int32)
    picks = np.argsort(rng.random((tokens, EXPERTS)))[:, :K].astype(np.int32)
    picks[0, 1] = -1  # padding adds nothing
    return picks


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "kind"), [(1, "all"), (2, "one for all"), (7, "some never"), (64, "all"), (1000, "one for all")]
)
def test_against_float64(tokens, kind, implementation, dtype, stored, rng):
    if implementation == "cuda" and dtype == jnp.float32:
        pytest.skip("not on CUDA")
    experts, values = stored[implementation]
    x = jnp.asarray(rng.normal(size=(tokens, experts.w1.codes.shape[-1] * 2)) * 0.7, dtype)
    picks, weights = picks_of(kind, tokens, rng), rng.uniform(0.1, 1.0, (tokens, K)).astype(np.float32)
    run = jax.jit(lambda *operands: apply_experts(*operands, limit=2.0, implementation=implementation))
    got = run(x, jnp.asarray(picks), jnp.asarray(weights), experts)
    assert got.dtype == dtype
    some = slice(0, None, max(1, tokens // 50))
    expected = expected_of(np.asarray(x, np.float64)[some], picks[some], weights[some], values, 2.0)
    error = np.linalg.norm(np.asarray(got, np.float64)[some] - expected) / np.linalg.norm(expected)
    assert error < LIMIT[dtype]


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_nobody_picked_and_company_change_no_bit(implementation, tokens, stored, rng):
    experts, _ = stored[implementation]
    x = jnp.asarray(rng.normal(size=(tokens, experts.w1.codes.shape[-1] * 2)), jnp.bfloat16)
    picks = np.array(rng.integers(1, EXPERTS, (tokens, K)), np.int32)
    weights = jnp.asarray(rng.random((tokens, K)), jnp.float32)
    run = jax.jit(lambda *operands: apply_experts(*operands, limit=10.0, implementation=implementation))
    before = run(x, jnp.asarray(picks), weights, experts)

    nan = jax.tree.map(lambda w: w.at[0].set(0xFF), experts)
    np.testing.assert_array_equal(before.view(jnp.uint16), run(x, jnp.asarray(picks), weights, nan).view(jnp.uint16))
    if tokens > 1:
        picks[1:] = rng.integers(1, EXPERTS, (tokens - 1, K))
        after = run(x.at[1:].set(jnp.nan), jnp.asarray(picks), weights, experts)
        np.testing.assert_array_equal(before[0].view(jnp.uint16), after[0].view(jnp.uint16))
        assert bool(jnp.isnan(after[1:]).all())


@pytest.mark.parametrize("implementation", ["jnp", None])
@pytest.mark.parametrize(("tokens", "k", "number"), [(0, K, EXPERTS), (2, 0, EXPERTS), (2, K, 0)])
def test_nothing_to_add(implementation, tokens, k, number, stored):
    """No tokens, no picks, or no experts."""
    experts = jax.tree.map(lambda w: w[:number], stored["jnp"][0])
    x, picks, weights = jnp.ones((tokens, 160)), jnp.zeros((tokens, k), jnp.int32), jnp.ones((tokens, k))
    got = apply_experts(x, picks, weights, experts, limit=10.0, implementation=implementation)
    np.testing.assert_array_equal(got, np.zeros((tokens, 160), np.float32))


def test_shapes_are_checked(stored):
    experts, _ = stored["jnp"]
    x, picks, weights = jnp.zeros((2, 160)), jnp.zeros((2, K), jnp.int32), jnp.zeros((2, K))
    with pytest.raises(ValueError, match="w2 has codes"):
        apply_experts(x, picks, weights, experts._replace(w2=experts.w1), limit=10.0)
    with pytest.raises(ValueError, match=r"expected \(2, k\)"):
        apply_experts(x, picks[:1], weights, experts, limit=10.0)
    with pytest.raises(ValueError, match="expected int32"):
        apply_experts(x, picks.astype(jnp.uint8), weights, experts, limit=10.0)
