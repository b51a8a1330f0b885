"""Experts spread over devices add what all of them on one device add."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsv4_jax.model import expert_parallel
from dsv4_jax.model.expert_parallel import exchange
from dsv4_jax.model.moe import Experts
from dsv4_jax.ops.formats.fp4 import quantise_fp4
from dsv4_jax.ops.nn.experts import ExpertWeights, Fp4Weight, apply_experts

EXPERTS, HIDDEN, INNER, TOKENS = 8, 64, 32, 5


@pytest.fixture
def tokens(rng):
    """x, picks, weights of 4 * TOKENS tokens; some pick one expert twice, some none."""
    x = rng.normal(size=(4 * TOKENS, HIDDEN)).astype(np.float32)
    picks = rng.integers(0, EXPERTS, (4 * TOKENS, 2)).astype(np.int32)
    picks[3], picks[7] = 5, -1
    return x, picks, rng.uniform(0.1, 1, picks.shape).astype(np.float32)


def over(mesh, experts, weights, x, picks, shares):
    """`experts(weights, x, picks, shares)` with weights spread over the mesh, as whole arrays."""

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def spread(weights, *tokens):
        return exchange(partial(experts, weights), *tokens, axis="data").astype(tokens[0].dtype)

    return np.asarray(jax.jit(spread)(weights, x, picks, shares))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_as_released(mesh, tokens, rng, dtype, monkeypatch):
    def weight(*shape):
        return Fp4Weight(
            *jax.jit(quantise_fp4, static_argnums=1)(rng.normal(size=shape).astype(np.float32) / 8, "mxfp4")
        )

    weights = ExpertWeights(
        weight(EXPERTS, INNER, HIDDEN), weight(EXPERTS, HIDDEN, INNER), weight(EXPERTS, INNER, HIDDEN)
    )

    def experts(weights, *tokens):
        return apply_experts(*tokens, weights, limit=10.0)

    def experts_here(weights, x, picks, shares):
        first = jax.lax.axis_index("data").astype(jnp.int32) * weights.w1.codes.shape[0]
        return experts(weights, x, picks - first, shares)

    x, picks, shares = tokens
    x = jnp.asarray(x, dtype)
    expected = np.asarray(jax.jit(experts)(weights, x, picks, shares), np.float32)
    results = [over(mesh(n), experts_here, weights, x, picks, shares) for n in (2, 4)]
    for got in results:
        assert got.dtype == dtype
        # Two picks: a rounding for each of two devices, and one of their sum.
        bound = 2e-6 if dtype == jnp.float32 else 3 * 2.0**-8
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=bound, atol=bound)
        assert not got[7].any()
    # On another device, and in other company, a token's bits are the same.
    moved = np.roll(np.arange(4 * TOKENS), 7)
    other = over(mesh(4), experts_here, weights, x[moved], picks[moved], shares[moved])
    assert other.tobytes() == results[1][moved].tobytes()
    # However what is added comes back.
    monkeypatch.setattr(expert_parallel, "FEW_BYTES", 0)
    other = over(mesh(4), experts_here, weights, x, picks, shares)
    assert other.tobytes() == results[1].tobytes()


@pytest.mark.parametrize("dense", [True, False])
def test_experts_in_floats(mesh, tokens, dense):
    from small_model import SMALL

    config = SMALL.replace(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS)
    whole = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(1))
    whole.dense = dense
    graphdef, state = nnx.split(whole)
    x, picks, shares = tokens
    expected = whole(jnp.asarray(x), jnp.asarray(picks), jnp.asarray(shares))

    def experts(state, *tokens):
        part = nnx.merge(graphdef, state)
        part.axes = ("data",)
        return part(*tokens)

    got = over(mesh(4), experts, state, x, picks, shares)
    np.testing.assert_allclose(got, np.asarray(expected), rtol=0, atol=5e-6)
