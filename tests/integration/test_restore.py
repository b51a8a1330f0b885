"""A request that was taken out of the cache and put back goes on as if nothing had happened."""

import numpy as np
import pytest
from flax import nnx
from small_model import SMALL
from stepper import Stepper

from dsv4_jax.model.transformer import DSV4Model

LENGTH, WIDTH = 45, 6
EXACT = "fp32"
"""Storage: on a cache of another size XLA may sum in another order, and a last bit can become another FP8 code."""


@pytest.fixture(scope="module")
def model():
    return DSV4Model(SMALL, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(8).integers(0, SMALL.vocab_size, LENGTH).tolist()


@pytest.fixture(scope="module")
def here(model):
    return Stepper(model, 2, context=48, cache_dtype=EXACT, max_rollback=4)


@pytest.fixture(scope="module")
def elsewhere(model):
    return Stepper(model, 3, context=60, cache_dtype=EXACT, debug_nan=True)


@pytest.mark.parametrize("at", [1, 3, 4, 7, 9, 12, 13, 24, 29, 36])
def test_it_goes_on(here, elsewhere, ids, at):
    """On the same cache in another slot with the same bits; on one of another size, full of NaN, as closely."""
    slot = here.manager.admit_request()
    here.feed(slot, ids[:at], (), width=WIDTH)
    snapshot = here.manager.snapshot(slot)
    rest = here.feed(slot, ids[at:], (), width=WIDTH, start=at)
    twin = here.manager.restore(snapshot)
    other = elsewhere.manager.restore(snapshot)
    assert twin != slot
    np.testing.assert_array_equal(here.feed(twin, ids[at:], (), width=WIDTH, start=at), rest)
    np.testing.assert_allclose(elsewhere.feed(other, ids[at:], (), width=WIDTH, start=at), rest, rtol=0, atol=1e-5)
    for stepper, slots in ((here, (slot, twin)), (elsewhere, (other,))):
        stepper.manager.check()
        for s in slots:
            stepper.manager.release_request(s)
        stepper.manager.check()


@pytest.mark.parametrize("at", [9, 13, 24, 26])
def test_it_can_go_back(here, ids, at):
    """With rollback kept, other tokens follow after a restore as if the forgotten ones had never been written."""
    slot = here.manager.admit_request()
    here.feed(slot, ids[: at + 3], (), width=WIDTH)
    snapshot = here.manager.preempt(slot, rollback=3)
    slot = here.manager.restore(snapshot)
    here.manager.rollback(slot, 3)
    after = here.feed(slot, ids[::-1][:12], (), width=WIDTH, start=at)
    fresh = here.manager.admit_request()
    here.feed(fresh, ids[:at], (), width=WIDTH)
    np.testing.assert_array_equal(after, here.feed(fresh, ids[::-1][:12], (), width=WIDTH, start=at))
    for s in (slot, fresh):
        here.manager.release_request(s)
    here.manager.check()
