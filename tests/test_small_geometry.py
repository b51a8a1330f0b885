"""Window and ratios are data: a model whose windows close every 2 to 8 tokens."""

import numpy as np
import pytest
from flax import nnx
from stepper import Stepper

import dsv4_jax
from dsv4_jax.model.transformer import DSV4Model

SMALL = dsv4_jax.DSV4Config.flash().replace(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 6), csa_ratio=4, hca_ratio=6,
    sliding_window=8, max_position_embeddings=512, num_attention_heads=2, head_dim=48, rope_dim=16, q_lora_rank=16,
    o_lora_rank=8, o_groups=2, index_n_heads=2, index_head_dim=32, index_topk=4, rope_original_max_position=64,
    hc_mult=2, hc_sinkhorn_iters=4, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
    num_hash_layers=1,
)  # fmt: skip
LENGTH = 45  # past five ring wraps and three blocks of 12 tokens


@pytest.fixture(scope="module")
def model():
    return DSV4Model(SMALL, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(8).integers(0, SMALL.vocab_size, LENGTH).tolist()


def feed(model, ids, cuts):
    stepper = Stepper(model, 1, context=48)
    stepper.manager.admit_request()
    logits = stepper.feed(0, ids, cuts, width=LENGTH)
    stepper.manager.check()
    return logits


def test_cuts_make_no_difference(model, ids):
    whole = feed(model, ids, ())
    for cuts in ((5,), (7, 8, 9, 23), tuple(range(1, LENGTH, 5))):
        np.testing.assert_allclose(feed(model, ids, cuts), whole, rtol=0, atol=5e-5)


def test_generate(model, ids):
    prompts = [ids[:20], ids[:3]]
    tokens = dsv4_jax.generate(model, prompts, 6, cache_dtype="fp32")
    assert [len(t) for t in tokens] == [6, 6]
    for prompt, new in zip(prompts, tokens, strict=True):
        whole = feed(model, [*prompt, *new, *ids][:LENGTH], ())
        assert np.argmax(whole, axis=-1)[len(prompt) - 1 : len(prompt) + 5].tolist() == new
