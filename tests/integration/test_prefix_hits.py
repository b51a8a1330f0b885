"""A prompt that begins like an earlier one goes on from what was kept: the same logits as a cold run."""

import numpy as np
import pytest
from flax import nnx
from small_model import SMALL
from stepper import Stepper

from dsv4_jax.cache.host.prefix import PrefixPolicy
from dsv4_jax.model.transformer import DSV4Model

LENGTH, WIDTH, BLOCK = 100, 12, 12
REACH = 7 * 3  # window - 1 rows in each of three layers


@pytest.fixture(scope="module")
def model():
    return DSV4Model(SMALL, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(8).integers(0, SMALL.vocab_size, LENGTH).tolist()


def stepper(model, policy, cache_dtype="fp8", **options):
    prefix = PrefixPolicy(policy, period=3 * BLOCK)
    return Stepper(model, 2, context=108, cache_dtype=cache_dtype, prefix=prefix, debug_nan=True, **options)


def serve(stepper, ids, salt=b"", width=WIDTH, keep=True):
    """Feeds a prompt in chunks, keeping its blocks as they fill -> what admission said, and the logits it computed."""
    admitted = stepper.manager.admit_prompt(ids, salt=salt)
    logits = []
    for start in range(admitted.start, len(ids), width):
        logits.append(stepper.feed(admitted.slot, ids[start : start + width], (), width=WIDTH, start=start))
        if keep and start + width >= admitted.hit_tokens:
            stepper.manager.keep_prefix(admitted.slot, ids, salt=salt)
        stepper.manager.check()
    return admitted, np.concatenate(logits)


@pytest.fixture(scope="module", params=["full", "periodic", "zero"])
def kept(request, model, ids):
    """A manager that has served ids and kept their blocks, and its policy."""
    s = stepper(model, request.param)
    admitted, _ = serve(s, ids)
    assert admitted[1:] == (0, 0, 0)
    s.manager.release_request(admitted.slot)
    s.manager.check()
    return s, request.param


@pytest.mark.parametrize("common", [5, 12, 13, 37, 48, 61, 73, 84, 97, 100])
def test_a_hit_has_the_logits_of_a_cold_run(kept, ids, common):
    """Prompts that share `common` tokens with an earlier one; chunks of the same shape, so the same bits."""
    s, policy = kept
    prompt = ids[:common] + [(t + 1) % SMALL.vocab_size for t in ids[common:]]
    admitted, cold = serve(s, prompt, salt=b"of somebody else", keep=False)
    assert admitted.start == 0
    s.manager.release_request(admitted.slot)
    admitted, logits = serve(s, prompt, keep=False)
    found = min(common, LENGTH - 1) // BLOCK * BLOCK
    start = {"full": found, "periodic": found // 36 * 36, "zero": max(found - REACH, 0) // BLOCK * BLOCK}[policy]
    hit = found if start else 0
    assert admitted[1:] == (start, hit, hit - start)
    exact = hit if policy == "zero" else start
    np.testing.assert_array_equal(logits[exact - start :], cold[exact:])
    s.manager.release_request(admitted.slot)
    s.manager.check()


@pytest.mark.parametrize("policy", ["full", "zero"])
def test_a_hit_cut_elsewhere(model, ids, policy):
    """Steps of other lengths than those that filled the blocks: as close as float32 is."""
    s = stepper(model, policy, "fp32", max_rollback=5)
    admitted, cold = serve(s, ids[:60])
    s.manager.release_request(admitted.slot)
    admitted, logits = serve(s, ids[:60], width=7)
    assert admitted.hit_tokens == 48
    exact = admitted.hit_tokens
    np.testing.assert_allclose(logits[exact - admitted.start :], cold[exact:], rtol=0, atol=1e-5)


def test_two_requests_at_once_and_what_is_shared(model, ids):
    """The second is admitted while the first runs; neither sees what the other does after the shared blocks."""
    s = stepper(model, "full", max_rollback=4)
    manager = s.manager
    first, cold = serve(s, ids[:50])
    second = manager.admit_prompt(ids[:50])
    assert second[1:] == (48, 48, 0)
    for kind in ("csa", "hca"):
        assert manager.blocks(second.slot)[kind][:4] == manager.blocks(first.slot)[kind][:4]
    for slot in (first.slot, second.slot):
        with pytest.raises(ValueError, match="cannot roll back 3 tokens"):
            manager.rollback(slot, 3)  # what is shared is not written again
    s.feed(first.slot, ids[::-1][:20], (), width=WIDTH, start=50)
    np.testing.assert_array_equal(s.feed(second.slot, ids[48:50], (), width=WIDTH, start=48), cold[48:])
    manager.check()


def test_a_request_that_is_not_complete_is_not_copied(model, ids):
    """While "zero" computes again, ring and tails are not what they seem."""
    s = stepper(model, "zero")
    manager = s.manager
    manager.release_request(serve(s, ids[:61])[0].slot)
    admitted = manager.admit_prompt(ids)
    assert admitted[1:] == (36, 60, 24)
    for call in (manager.fork, manager.snapshot, lambda slot: manager.keep_prefix(slot, ids)):
        with pytest.raises(ValueError, match=r"has 36 tokens and goes on from a prefix hit: .* complete with token 60"):
            call(admitted.slot)
    with pytest.raises(ValueError, match="cannot roll back 1 tokens"):
        manager.rollback(admitted.slot, 1)
    manager.release_request(admitted.slot)
    manager.check()


def test_less_than_a_window_a_layer_is_not_enough(model, ids):
    """What "zero" computes again is needed: a block later it would not be the same logits."""
    s = stepper(model, "zero")
    admitted, cold = serve(s, ids[:61])
    s.manager.release_request(admitted.slot)
    s.manager._books.prefix._reach -= BLOCK
    admitted, logits = serve(s, ids[:61], keep=False)
    assert admitted[1:] == (48, 60, 12)
    assert not np.array_equal(logits[-1], cold[-1])
