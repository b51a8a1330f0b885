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


def test_generate(model, ids):
    prompts = [ids[:20], ids[:3]]
    tokens = dsv4_jax.generate(model, prompts, 6, cache_dtype="fp32")
    assert [len(t) for t in tokens] == [6, 6]
    for prompt, new in zip(prompts, tokens, strict=True):
        whole = feed(model, [*prompt, *new, *ids][:LENGTH], ())
        assert np.argmax(whole, axis=-1)[len(prompt) - 1 : len(prompt) + 5].tolist() == new
