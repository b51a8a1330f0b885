"""Going back and branching: what follows is as if the rest had never been written."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from stepper import Stepper

import dsv4_jax
from dsv4_jax.cache.transfer.slots import copy_slot
from dsv4_jax.model.transformer import DSV4Model

SHARP = Path(__file__).parents[1] / "data" / "sharp_dsv4"
CONFIG = dsv4_jax.DSV4Config.from_hf(SHARP).replace(
    num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, index_topk=8
)
ROLLBACK, WIDTH, LENGTH = 9, 160, 280
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # of rounding alone; 6e-5 was seen where XLA may use no more than SSE4.2


@pytest.fixture(scope="module")
def model():
    return DSV4Model(CONFIG, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, LENGTH).tolist()


@pytest.fixture(scope="module")
def whole(model, ids):
    return fresh(model).feed(0, ids, (), width=WIDTH)


def fresh(model, slots=1, **options):
    stepper = Stepper(model, slots, max_rollback=ROLLBACK, **options)
    stepper.manager.admit_request()
    return stepper


def as_if_run(manager, plan):
    """A step that writes nothing but what every step does."""
    manager.cache = manager.cache.with_blocks(plan.new_blocks)


@pytest.mark.parametrize("keep", [1, 3, 4, 120, 126, 127, 128, 130, 255, 256, 261])
def test_rollback(model, ids, whole, keep):
    """Other tokens are written and forgotten: across windows of 4 and 128, blocks and the ring's wrap."""
    stepper = fresh(model)
    stepper.feed(0, ids[:keep], (), width=WIDTH)
    manager = stepper.manager
    blocks = manager.blocks(0)
    for wrong in (1, 4, ROLLBACK):
        stepper.feed(0, ids[::-1][:wrong], (), width=WIDTH, start=keep)
        manager.rollback(0, wrong)
        assert manager.length(0) == keep
        assert manager.blocks(0) == blocks
        manager.check()
    end = min(keep + 12, LENGTH)
    np.testing.assert_allclose(
        stepper.feed(0, ids[keep:end], (), width=WIDTH, start=keep), whole[keep:end], **TOLERANCE
    )


def test_rollback_token_by_token(model, ids, whole):
    """Every decode step is taken twice, the first time with the wrong token."""
    stepper = fresh(model)
    stepper.feed(0, ids[:120], (), width=WIDTH)
    for p in range(120, 140):
        stepper.feed(0, [1], (), width=1, start=p)
        stepper.manager.rollback(0, 1)
        np.testing.assert_allclose(stepper.feed(0, ids[p : p + 1], (), width=1, start=p)[0], whole[p], **TOLERANCE)


@pytest.mark.parametrize("n", [-1, ROLLBACK + 1, 6])
def test_rollback_too_far(model, n):
    manager = fresh(model).manager
    plan = manager.plan_step([0] * 5, np.arange(5))
    with pytest.raises(ValueError, match=f"cannot roll back {n} tokens: it has 5 and max_rollback is 9"):
        manager.rollback(0, n)
    assert manager.length(0) == 5
    plan.cancel()
    assert manager.length(0) == 0


def test_rollbacks_add_up(model):
    """What one rollback took counts for the next, until as many tokens came after it: their rows are overwritten."""
    manager = fresh(model, 2).manager
    as_if_run(manager, manager.plan_step([0] * 30, np.arange(30)))
    manager.rollback(0, 5)
    child = manager.fork(0)
    for slot in (0, child):
        for n in (5, 25):
            with pytest.raises(ValueError, match=f"roll back {n} tokens: it has 25 .* expected 0 to 4"):
                manager.rollback(slot, n)
    as_if_run(manager, manager.plan_step([0] * 3, np.arange(25, 28)))
    with pytest.raises(ValueError, match="expected 0 to 7"):
        manager.rollback(0, 8)
    manager.rollback(0, 7)
    manager.rollback(child, 4)
    assert (manager.length(0), manager.length(child)) == (21, 21)


def test_a_step_goes_on_where_the_request_ends(model):
    """Tokens before the end would cut the request short unseen, tokens beyond it leave some out."""
    manager = fresh(model).manager
    plan = manager.plan_step([0] * 5, np.arange(5))
    for start, what_to_do in ((0, "roll back"), (4, "roll back"), (6, "advance")):
        with pytest.raises(
            ValueError, match=f"brings position {start} and has 5 tokens: expected .* from 5 on; .*{what_to_do}"
        ):
            manager.plan_step([0] * 3, start + np.arange(3))
    assert manager.length(0) == 5
    del plan
    assert manager.length(0) == 0


@pytest.mark.parametrize("at", [2, 127, 128, 133, 140, 200])
def test_fork(model, ids, whole, at):
    """Parent and child go on with different tokens across the next edges; each sees only its own."""
    stepper = fresh(model, 2)
    stepper.feed(0, ids[:at], (), width=WIDTH)
    manager = stepper.manager
    assert manager.fork(0) == 1
    manager.check()
    assert manager.length(1) == at
    # Only blocks that neither can reach by a rollback are shared.
    settled = max(at - ROLLBACK, 0) // 128
    for kind, blocks in manager.blocks(0).items():
        assert len(set(blocks) & set(manager.blocks(1)[kind])) == min(settled, len(blocks))
    other = ids[::-1]
    parent = stepper.feed(0, other[:60], (), width=WIDTH, start=at)
    child = stepper.feed(1, ids[at : at + 60], (), width=WIDTH, start=at)
    np.testing.assert_allclose(child, whole[at : at + 60], **TOLERANCE)
    alone = fresh(model)
    alone.feed(0, ids[:at] + other[:60], (at,), width=WIDTH)
    manager.release_request(1)
    manager.check()
    np.testing.assert_allclose(
        stepper.feed(0, other[60:70], (), width=WIDTH, start=at + 60),
        alone.feed(0, other[60:70], (), width=WIDTH, start=at + 60),
        **TOLERANCE,
    )
    assert not np.allclose(parent, child, **TOLERANCE)


def test_a_child_rolls_back_without_touching_its_parent(model, ids, whole):
    stepper = fresh(model, 2)
    stepper.feed(0, ids[:130], (), width=WIDTH)
    manager = stepper.manager
    manager.fork(0)
    manager.rollback(1, 5)
    stepper.feed(1, ids[::-1][:20], (), width=WIDTH, start=125)
    after = stepper.feed(0, ids[130:150], (), width=WIDTH, start=130)
    np.testing.assert_allclose(after, whole[130:150], **TOLERANCE)
    manager.release_request(0)
    manager.release_request(1)
    manager.check()
    assert manager.num_free_blocks("csa") == manager.cache.paged["csa"].num_blocks


def test_a_fork_that_does_not_fit_changes_nothing(model, ids):
    stepper = fresh(model, 2, context=128)
    manager = stepper.manager
    stepper.feed(0, ids[:100], (), width=WIDTH)
    other = manager.admit_request()
    with pytest.raises(RuntimeError, match="concurrent"):
        manager.fork(0)
    stepper.feed(other, ids[:4], (), width=WIDTH)  # takes the last free CSA block
    manager._books.requests.free_slots.append(5)  # a slot would be free, a block is not
    before = manager.blocks(0)
    with pytest.raises(RuntimeError, match="OOM: 1 more CSA blocks"):
        manager.fork(0)
    manager._books.requests.free_slots.remove(5)
    assert manager.blocks(0) == before
    assert manager.active_slots == [0, 1]
    manager.check()
    with pytest.raises(ValueError, match="slot 7 holds no request"):
        manager.fork(7)


def test_fork_is_in_place(model):
    manager = fresh(model, 2).manager
    copies = {kind: np.full((2, 2), -1, np.int32) for kind in ("csa", "hca")}
    compiled = copy_slot.lower(manager.cache, np.int32(0), np.int32(1), copies).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == manager.memory_bytes()
    one_slot_and_block = sum(
        x.nbytes // x.shape[1] for x in jax.tree.leaves((manager.cache.state, manager.cache.paged))
    )
    assert memory.temp_size_in_bytes <= one_slot_and_block + 65536 < manager.memory_bytes()
