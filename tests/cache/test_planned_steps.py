"""What becomes of a plan is never guessed: the cache says what ran, and a plan of which a copy exists may still run."""

import copy
import dataclasses
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import LayerCacheHandle
from dsv4_jax.cache.kv_cache import RAN_STEPS

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


@pytest.fixture(autouse=True)
def old_objects():
    """What there was before a test is no garbage of its: looking through all of it takes half a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def rebuilt(plan):
    leaves, structure = jax.tree.flatten(plan)
    return structure.unflatten([jnp.asarray(x) for x in leaves])


COPIES = {
    "device_put": jax.device_put,
    "tree.map": lambda plan: jax.tree.map(lambda x: x + 0, plan),
    "replace": lambda plan: dataclasses.replace(plan, max_blocks=2),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda plan: pickle.loads(pickle.dumps(plan)),
    "jit": jax.jit(lambda plan: plan),
    "rebuilt": rebuilt,
    "stacked": lambda plan: jax.tree.map(lambda x: x[0], jax.tree.map(lambda x: np.stack([x, x]), plan)),
    "its blocks": lambda plan: dataclasses.replace(plan, new_blocks=jax.device_put(plan.new_blocks)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_may_still_run(make, how):
    """What is released meanwhile waits for it, and no longer."""
    manager = make()
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 8, np.arange(8))
    other = COPIES[how](plan)
    del plan
    gc.collect()
    manager.release_request(slot)
    assert manager.num_free_blocks("csa") == 3
    assert manager.admit_request() == 1
    manager.check()
    manager.cache = step(manager.cache, other)
    assert manager.num_free_blocks("csa") == 4
    assert manager.admit_request() == 0
    manager.check()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_gone_will_not_run(make, how):
    manager = make()
    slot = manager.admit_request()
    COPIES[how](manager.plan_step([slot] * 8, np.arange(8)))
    gc.collect()
    assert manager.length(slot) == 0
    assert manager.num_free_blocks("csa") == 4
    manager.check()


def test_which_of_two_plans_ran(make):
    """The first is gone before its result is assigned; the second, whose request ended, waits."""
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    plans = [manager.plan_step([a] * 8, np.arange(8)), manager.plan_step([b] * 8, np.arange(8))]
    manager.cache = step(manager.cache, plans.pop(0))
    manager.release_request(b)
    with pytest.raises(RuntimeError, match="1 of them wait until planned steps are dispatched"):
        manager.admit_request()
    assert (manager.length(a), manager.num_free_blocks("csa")) == (8, 2)
    manager.cache = step(manager.cache, plans.pop())
    assert (manager.length(a), manager.admit_request(), manager.num_free_blocks("csa")) == (8, b, 3)
    manager.check()


def test_steps_of_two_requests_in_any_order(make):
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    first, second = manager.plan_step([a] * 8, np.arange(8)), manager.plan_step([b] * 9, np.arange(9))
    manager.cache = step(manager.cache, second)
    with pytest.raises(ValueError, match=f"slot {a} has a planned step"):
        manager.snapshot(a)
    manager.snapshot(b)
    manager.cache = step(manager.cache, first)
    manager.cache = step(manager.cache, first)  # once more, nothing having come after it
    manager.snapshot(a)
    assert (manager.length(a), manager.length(b)) == (8, 9)
    manager.check()


@pytest.mark.parametrize("how", ["cancelled", "dropped", "failed"])
def test_a_plan_that_never_runs(make, how):
    """Lengths, blocks and what can be rolled back are as before, and the same tokens can be planned again."""
    manager = make(max_rollback=3)
    slot = manager.admit_request()
    manager.cache = step(manager.cache, manager.plan_step([slot] * 126, np.arange(126)))
    before = manager.length(slot), manager.blocks(slot), manager._books.requests.pinned(slot)
    plan = manager.plan_step([slot] * 8, np.arange(126, 134))
    assert manager.length(slot) == 134
    if how == "cancelled":
        plan.cancel()
        plan.cancel()
    elif how == "failed":
        with pytest.raises(AttributeError):
            step(None, plan)
    del plan
    assert (manager.length(slot), manager.blocks(slot), manager._books.requests.pinned(slot)) == before
    assert manager.num_free_blocks("csa") == 3
    manager.check()
    manager.rollback(slot, 3)
    manager.cache = step(manager.cache, manager.plan_step([slot] * 8, np.arange(123, 131)))
    assert manager.length(slot) == 131
    manager.check()


def test_planning_again_what_was_dropped(make):
    """Without anybody asking for lengths in between, and with the cache that came back still being computed."""
    manager = make()
    slot = manager.admit_request()
    for _ in range(3):
        manager.plan_step([slot] * 8, np.arange(8))
    manager.cache = step(manager.cache, manager.plan_step([slot] * 8, np.arange(8)))
    manager.plan_step([slot], [8])
    with pytest.raises(ValueError, match="brings position 10 and has 8 tokens"):
        manager.plan_step([slot], [10])
    manager.check()


def test_cancel_says_why_not(make):
    manager = make()
    slot = manager.admit_request()
    first = manager.plan_step([slot] * 8, np.arange(8))
    second = manager.plan_step([slot], [8])
    with pytest.raises(ValueError, match="a later plan goes on from them: cancel that one first"):
        first.cancel()
    assert manager.length(slot) == 9
    manager.cache = step(manager.cache, first)
    with pytest.raises(ValueError, match="the step of this plan has run: roll back instead"):
        jax.device_put(first).cancel()
    second.cancel()
    assert manager.length(slot) == 8
    manager.check()


def test_a_rollback_to_before_a_plan_that_never_runs(make):
    """What was planned anew in its place stays."""
    manager = make(max_rollback=9)
    slot = manager.admit_request()
    manager.cache = step(manager.cache, manager.plan_step([slot] * 126, np.arange(126)))
    plan = manager.plan_step([slot] * 8, np.arange(126, 134))
    manager.rollback(slot, 8)
    again = manager.plan_step([slot] * 7, np.arange(126, 133))
    plan.cancel()
    assert manager.length(slot) == 133
    manager.cache = step(manager.cache, again)
    manager.check()
    assert (manager.length(slot), manager.num_free_blocks("csa")) == (133, 2)


@pytest.mark.parametrize("fault", ["another order", "one left out", "taken back", "older"])
def test_steps_that_should_not_have_run_are_noticed(make, fault):
    manager = make()
    slot = manager.admit_request()
    first = manager.plan_step([slot] * 8, np.arange(8))
    if fault == "taken back":
        first.cancel()
        manager.cache = step(manager.cache, first)
        first = manager.plan_step([slot] * 8, np.arange(8))
        message = "was taken back, and its step ran"
    elif fault == "older":
        old = manager.cache
        for _ in range(2):
            manager.cache = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks))(manager.cache, first)
            manager.check()
            first = manager.plan_step([slot], [manager.length(slot)])
        manager.cache = old
        message = "is older than the one before"
    else:
        second = manager.plan_step([slot], [8])
        manager.cache = step(manager.cache, second)
        if fault == "another order":
            manager.cache = step(manager.cache, first)
        else:
            del first
        message = "ran before the step whose tokens it goes on from"
    with pytest.raises(RuntimeError, match=message):
        manager.num_free_blocks("csa")
    with pytest.raises(AssertionError, match=message):
        manager.check()
    manager.reset()
    manager.check()


def test_steps_are_not_compiled_again_and_nobody_waits(make, monkeypatch):
    """More steps than the cache remembers, each with a plan that is gone at once, in one program."""
    manager = make(max_context_len=256, num_blocks_per_csa_layer=8, num_blocks_per_hca_layer=8)
    program = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)
    slots = [manager.admit_request(), manager.admit_request()]
    waited = []
    books = type(manager._books)
    look = books.look
    monkeypatch.setattr(books, "look", lambda self, *, wait: waited.append(wait) or look(self, wait=wait))
    for p in range(3 * RAN_STEPS):
        manager.cache = program(manager.cache, manager.plan_step(slots, [p, p]))
        jax.block_until_ready(manager.cache)
    assert program._cache_size() == 1
    assert not any(waited)
    assert 3 <= len(waited) <= 6
    assert [manager.length(s) for s in slots] == [3 * RAN_STEPS] * 2
    assert len(manager._books.requests.pending) == 0
    manager.check()


def test_more_steps_than_the_cache_remembers(make):
    """A loop on the device runs a plan many times: what the cache forgot is known not to come any more."""
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    plans = [manager.plan_step([s], [0]) for s in (a, b)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *plans)

    @jax.jit
    def many(cache, both):
        def body(i, cache):
            return cache.with_blocks(jax.tree.map(lambda x: x[i % 2], both).new_blocks)

        return jax.lax.fori_loop(0, 3 * RAN_STEPS, body, cache)

    manager.cache = many(manager.cache, both)
    del plans, both
    assert (manager.length(a), manager.length(b)) == (1, 1)
    manager.check()


def test_blocks_cannot_be_forgotten(make, weights):
    """A handle enters the blocks of its plan; doing it by hand too changes nothing, and is traced once."""
    x, w = jnp.ones((4, 1024)), weights(4, 512, 2)

    def write(cache, plan, x, w, times):
        for _ in range(times):
            cache = cache.with_blocks(plan.new_blocks)
        first = LayerCacheHandle(cache, plan, 1).write_compressed(x, x, w)
        second = LayerCacheHandle(first.cache, plan, 3).write_compressed(x, x, w)
        return second.read_classical_view(), second.cache

    got, scatters = [], []
    for times in (0, 1, 2):
        manager = make()
        plan = manager.plan_step([manager.admit_request()] * 4, np.arange(4))
        traced = str(jax.make_jaxpr(lambda *a, n=times: write(*a, n))(manager.cache, plan, x, w))
        scatters.append(traced.count("scatter["))
        view, manager.cache = jax.jit(write, static_argnums=4)(manager.cache, plan, x, w, times)
        manager.check()
        assert view.valid.any()
        got.append(view.kv)
    assert (got[0] == got[1]).all()
    assert (got[0] == got[2]).all()
    assert got[0][0, 0].any()
    assert len(set(scatters)) == 1
