"""A model whose HCA layers keep running sums computes what it computes with all tokens in the tail."""

import numpy as np
import pytest
from flax import nnx
from small_model import SMALL
from stepper import Stepper

from dsv4_jax.model.transformer import DSV4Model

LENGTH, WIDTH, ROLLBACK = 45, 12, 4
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # of rounding alone; 6e-5 was seen where XLA may use no more than SSE4.2


@pytest.fixture(scope="module")
def model():
    return DSV4Model(SMALL, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(8).integers(0, SMALL.vocab_size, LENGTH).tolist()


@pytest.fixture(scope="module")
def whole(model, ids):
    """Logits with a full tail."""
    stepper = Stepper(model, 1, context=48)
    stepper.manager.admit_request()
    return stepper.feed(0, ids, (), width=WIDTH)


@pytest.fixture(scope="module")
def running(model):
    return Stepper(model, 2, context=48, hca_tail="running", max_rollback=ROLLBACK, debug_nan=True)


@pytest.fixture
def stepper(running):
    yield running
    for slot in running.manager.active_slots:
        running.manager.release_request(slot)


@pytest.mark.parametrize("cuts", [(), (1, 5, 6, 7), (2, 11, 12, 13, 30), tuple(range(3, 45, 3))])
def test_cut_anywhere(stepper, ids, whole, cuts):
    slot = stepper.manager.admit_request()
    np.testing.assert_allclose(stepper.feed(slot, ids, cuts, width=WIDTH), whole, **TOLERANCE)


@pytest.mark.parametrize("start", [1, 5, 6, 7, 15])
def test_prefill_and_decode(stepper, ids, whole, start):
    slot, end = stepper.manager.admit_request(), start + 14
    stepper.feed(slot, ids[:start], (), width=WIDTH)
    rest = stepper.feed(slot, ids[start:end], (), width=1, start=start)
    np.testing.assert_allclose(rest, whole[start:end], **TOLERANCE)


@pytest.mark.parametrize("keep", [5, 6, 7, 9, 10, 11, 12, 16, 23, 24])
@pytest.mark.parametrize("width", [1, WIDTH])
def test_rollback_within_a_window_and_across_its_edge(stepper, ids, whole, keep, width):
    """Other tokens are written and forgotten, and the right ones follow."""
    manager, slot = stepper.manager, stepper.manager.admit_request()
    stepper.feed(slot, ids[:keep], (), width=WIDTH)
    for wrong in (1, 3, ROLLBACK):
        stepper.feed(slot, ids[::-1][:wrong], (), width=width, start=keep)
        manager.rollback(slot, wrong)
        manager.check()
    end = keep + 9
    rest = stepper.feed(slot, ids[keep:end], (), width=width, start=keep)
    np.testing.assert_allclose(rest, whole[keep:end], **TOLERANCE)


@pytest.mark.parametrize("at", [5, 6, 7, 11, 27])
def test_fork_and_snapshot(stepper, ids, whole, at):
    """A child, and a request that was taken out and put back, go on while the parent takes other tokens."""
    manager, parent = stepper.manager, stepper.manager.admit_request()
    stepper.feed(parent, ids[:at], (), width=WIDTH)
    snapshot = manager.snapshot(parent)
    child = manager.fork(parent)
    stepper.feed(parent, ids[::-1][:8], (), width=WIDTH, start=at)
    after = stepper.feed(child, ids[at : at + 8], (), width=WIDTH, start=at)
    np.testing.assert_allclose(after, whole[at : at + 8], **TOLERANCE)
    manager.release_request(parent)
    again = manager.restore(snapshot)
    after = stepper.feed(again, ids[at : at + 8], (3,), width=WIDTH, start=at)
    np.testing.assert_allclose(after, whole[at : at + 8], **TOLERANCE)


def test_a_snapshot_of_another_tail_is_refused(model, stepper, ids):
    other = Stepper(model, 1, context=48, max_rollback=ROLLBACK).manager
    slot = stepper.manager.admit_request()
    with pytest.raises(ValueError, match="HCA layers have hca_tail 'running', this cache's 'full'"):
        other.restore(stepper.manager.snapshot(slot))
