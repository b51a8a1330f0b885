"""Window and ratios are data: a model whose windows close every 2 to 8 tokens."""

import numpy as np
import pytest
from flax import nnx
from small_model import SMALL
from stepper import Stepper

import dsv4_jax
from dsv4_jax.model.transformer import DSV4Model

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


@pytest.fixture(scope="module")
def prompts(ids):
    return [ids[:31], ids[20:25], ids[5:34], ids[:1]]


def generate(model, prompts):
    return dsv4_jax.generate(model, prompts, 8, cache_dtype="fp32", return_logits=True)


def test_generate(model, ids, prompts):
    tokens, logits = generate(model, prompts)
    assert [len(t) for t in tokens] == [8] * 4
    for prompt, new, got in zip(prompts, tokens, logits, strict=True):
        whole = feed(model, [*prompt, *new, *ids][:LENGTH], ())[len(prompt) - 1 : len(prompt) + 7]
        assert np.argmax(whole, axis=-1).tolist() == new
        np.testing.assert_allclose(got, whole, rtol=0, atol=5e-5)


def test_order_of_a_batch(model, prompts):
    """generate gives each prompt the same tokens and logits in any batch."""
    tokens, logits = generate(model, prompts)
    turned, turned_logits = generate(model, prompts[::-1])
    assert tokens == turned[::-1]
    for a, b in zip(logits, turned_logits[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
