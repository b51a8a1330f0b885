"""What is left of a request after its end: a handle that is an error, blocks that wait, bytes that show."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.host.slot import Slot
from dsv4_jax.ops.formats.record import decode_record
from dsv4_jax.ops.read.entries import read_keys

SWA, CSA, HCA = 0, 1, 2

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


def test_a_slot_is_its_number():
    slot = Slot(3, 7)
    assert slot == 3
    assert hash(slot) == hash(3)
    assert f"{slot}" == repr(slot) == "3"
    assert [10, 11, 12, 13][slot] == 13
    for again in (copy.copy(slot), pickle.loads(pickle.dumps(slot))):
        assert (again, again.generation) == (3, 7)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, s: m.length(s),
        lambda m, s: m.blocks(s),
        lambda m, s: m.release_request(s),
        lambda m, s: m.rollback(s, 0),
        lambda m, s: m.fork(s),
        lambda m, s: m.advance(s, 1),
        lambda m, s: m.allocate_block(CSA, s),
        lambda m, s: m.plan_step([s], [0]),
        lambda m, s: m.plan_step((-1, s), (0, 0)),
        lambda m, s: m.acquire(CSA, [s], [0]),
    ],
)
def test_a_stale_handle_is_an_error(make, call):
    manager = make(max_concurrent_requests=1)
    old = manager.admit_request()
    manager.release_request(old)
    with pytest.raises(ValueError, match="slot 0 holds no request"):
        call(manager, old)
    new = manager.admit_request()
    assert (old, old.generation, new.generation) == (new, 0, 1)
    with pytest.raises(ValueError, match="slot 0 was released and has been given out again"):
        call(manager, old)
    assert (manager.length(new), manager.blocks(new)) == (0, {"csa": [], "hca": []})
    assert [s.generation for s in manager.active_slots] == [1]
    assert manager.length(0) == 0  # a plain integer is the request that is there
    manager.plan_step(np.array([new]), [0])
    manager.check()


def test_what_a_planned_step_reads_is_not_given_to_others(make):
    """Slot and blocks of a request that ends between plan and dispatch are free after the dispatch, not before."""
    manager = make(num_blocks_per_csa_layer=2, num_blocks_per_hca_layer=2)
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 200, np.arange(200))
    manager.release_request(slot)
    assert manager.num_free_blocks("csa") == 0
    other = manager.admit_request()
    assert other == 1  # slot 0 is not free either
    with pytest.raises(RuntimeError, match="1 more CSA blocks are needed, 0 are free and 2 wait until planned steps"):
        manager.plan_step([other] * 4, np.arange(4))
    with pytest.raises(RuntimeError, match=r"requests are running \(1 of them wait until planned steps"):
        manager.admit_request()
    manager.check()
    manager.cache = step(manager.cache, plan)
    # The step entered its blocks in the table of a slot that nobody holds any more: they are taken out.
    manager.check()
    assert (manager.num_free_blocks("csa"), manager.admit_request()) == (2, 0)
    del plan


def test_steps_planned_ahead_are_dispatched_in_order(make):
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    first, second = manager.plan_step([a] * 8, np.arange(8)), manager.plan_step([b] * 8, np.arange(8))
    manager.release_request(b)
    manager.cache = step(manager.cache, first)
    assert manager.num_free_blocks("csa") == 2  # two have owners or wait
    with pytest.raises(RuntimeError, match="1 of them wait"):
        manager.admit_request()
    manager.check()
    manager.cache = step(manager.cache, second)
    assert manager.num_free_blocks("csa") == 3
    assert manager.admit_request() == b
    manager.check()


def test_a_plan_that_is_gone_keeps_nothing(make):
    """A loop that fails between plan and dispatch leaks nothing."""
    manager = make()
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 8, np.arange(8))
    manager.release_request(slot)
    assert manager.num_free_blocks("csa") == 3
    del plan
    assert manager.num_free_blocks("csa") == 4
    assert {manager.admit_request(), manager.admit_request()} == {0, 1}
    manager.check()


def test_a_rollback_between_plan_and_dispatch(make):
    """The step enters the block that the rollback gave up; it is taken out, and what was planned since stays."""
    manager = make(max_rollback=9)
    slot = manager.admit_request()
    manager.cache = step(manager.cache, manager.plan_step([slot] * 128, np.arange(128)))
    plan = manager.plan_step([slot] * 8, np.arange(128, 136))
    before = manager.blocks(slot)["csa"]
    manager.rollback(slot, 8)
    assert len(manager.blocks(slot)["csa"]) == 1
    again = manager.plan_step([slot] * 4, np.arange(128, 132))
    assert manager.blocks(slot)["csa"][1] != before[1]
    manager.cache = step(manager.cache, plan)
    manager.cache = step(manager.cache, again)
    manager.check()
    assert manager.num_free_blocks("csa") == 2


def test_a_request_is_copied_only_when_its_steps_are_dispatched(make):
    manager = make()
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 8, np.arange(8))
    with pytest.raises(ValueError, match="slot 0 has a planned step that was not dispatched"):
        manager.fork(slot)
    manager.cache = step(manager.cache, plan)
    assert manager.fork(slot) == 1


def test_the_cache_is_with_a_step(make):
    """A request may end while its step has the cache; what needs the cache says that it is away."""
    manager = make()
    slot, other = manager.admit_request(), manager.admit_request()
    result = step(manager.cache, manager.plan_step([slot] * 8, np.arange(8)))
    manager.release_request(slot)
    with pytest.raises(RuntimeError, match="the cache was donated to a step"):
        manager.fork(other)
    with pytest.raises(RuntimeError, match="the cache was donated to a step"):
        manager.allocate_block(CSA, other)
    assert manager.blocks(other)["csa"] == []
    for read in (lambda: manager.acquire(CSA, [other], [0]), lambda: manager.state_pools[CSA]):
        with pytest.raises(RuntimeError, match="the cache was donated to a step"):
            read()
    for wrong, what in [
        (None, "a NoneType"),
        ((1, result), "a tuple"),
        (make(max_concurrent_requests=1).cache, "a ca"),
    ]:
        with pytest.raises(ValueError, match=f"manager.cache got {what}.*: expected the cache that its step returned"):
            manager.cache = wrong
    manager.cache = result
    assert manager.num_free_blocks("csa") == 4
    manager.check()


@pytest.mark.parametrize("formats", [("fp8", "nvfp4"), ("fp8_ue8m0", "mxfp4"), ("bf16", "bf16")])
def test_debug_mode_leaves_nan(make, formats):
    """Every value of a free block and of a free slot reads as NaN, in every format."""
    manager = make(cache_dtype=formats[0], indexer_dtype=formats[1], debug_nan=True)
    manager.check()
    slot = manager.admit_request()
    manager.plan_step([slot] * 8, np.arange(8))
    state, paged = jax.tree.map(
        lambda x: x if x.dtype == jnp.int32 else jnp.asarray(np.zeros(x.shape, x.dtype)),
        (manager.cache.state, manager.cache.paged),
    )
    manager.cache = manager.cache.replace_state(state, paged, manager.cache.block_table)
    manager.release_request(slot)
    paged, state = manager.paged_pools[CSA], manager.state_pools[CSA]
    decode = jax.jit(decode_record)
    assert np.isnan(np.asarray(decode(paged.entries))[0]).all()
    first_block = np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.full(1, 32, np.int32)
    keys = jax.jit(partial(read_keys, format=formats[1], layer=0))(manager.cache.paged["csa"].indexer, *first_block)
    assert np.isnan(np.asarray(keys)).all()
    ring = state.ring
    assert np.isnan(np.asarray(decode(type(paged.entries)(ring.nope, ring.rope, ring.inv_scale)))[0]).all()
    assert (np.asarray(ring.pos)[0] == -1).all()
    assert np.isnan(np.asarray(state.tail_ka)[0]).all()
    assert np.isnan(np.asarray(manager.state_pools[HCA].tail_za)[0]).all()
    assert not np.asarray(paged.entries_rope)[1:].any()  # others are not touched
    with pytest.raises(AssertionError, match="somebody wrote to free CSA blocks"):
        manager.check()  # the zeros above were written to free blocks, too
