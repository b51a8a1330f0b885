"""The forms of the routed experts: all for every token, those one token picked, tokens sorted by expert."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.moe import Experts, MoE


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_forms_agree(num_tokens):
    config = DSV4Config.flash().replace(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=3, swiglu_limit=0.5
    )
    experts = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_tokens, 16)).astype(np.float32))
    picks = jnp.asarray(np.stack([rng.permutation(6)[:3] for _ in range(num_tokens)]).astype(np.int32))
    weights = jnp.asarray(rng.random((num_tokens, 3)).astype(np.float32))
    run = nnx.jit(lambda experts, *arguments: experts(*arguments))
    experts.dense = True
    dense = run(experts, x, picks, weights)
    experts.dense = False
    sorted_by_expert = run(experts, x, picks, weights)
    assert float(jnp.abs(dense).max()) > 0.01
    np.testing.assert_allclose(dense, sorted_by_expert, rtol=1e-5, atol=1e-6)
    by_hand = sum(
        float(weights[0, j]) * _expert(experts, x[0], int(picks[0, j]), config.swiglu_limit)
        for j in range(picks.shape[1])
    )
    np.testing.assert_allclose(dense[0], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_padding_reads_no_expert(dense):
    config = DSV4Config.flash().replace(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=3, vocab_size=8
    )
    moe = MoE(config, config.schedule[0], dtype=jnp.float32, rngs=nnx.Rngs(0))
    moe.experts.dense = dense
    x, ids = jnp.ones((4, 16)), jnp.zeros(4, jnp.int32)
    run = nnx.jit(MoE.parts)
    whole, routed = run(moe, x, ids)[0], run(moe, x, ids, jnp.asarray([0, -1, -1, 2], jnp.int32))[0]
    np.testing.assert_array_equal(routed[1:3], np.zeros((2, 16)))
    np.testing.assert_array_equal(routed[::3], whole[::3])
    assert float(jnp.abs(whole).min(axis=1).max()) > 0


def _expert(experts, x, e, limit):
    w1, w2, w3 = (np.asarray(w[...])[e].astype(np.float64) for w in (experts.w1, experts.w2, experts.w3))
    gate, up = np.minimum(w1 @ np.asarray(x), limit), np.clip(w3 @ np.asarray(x), -limit, limit)
    return w2 @ (gate / (1 + np.exp(-gate)) * up)
