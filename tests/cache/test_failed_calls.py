"""Calls that the device refuses half-way: nothing is lost, and the next call goes through."""

import jax
import numpy as np
import pytest
from small_model import SMALL

from dsv4_jax import KVCacheManager, PrefixPolicy, build_schedule
from dsv4_jax.cache import holder

BLOCK = 12

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


def make(policy="full"):
    return KVCacheManager(
        SMALL, build_schedule(SMALL), max_concurrent_requests=3, num_blocks_per_csa_layer=16,
        num_blocks_per_hca_layer=16, max_context_len=96, prefix=PrefixPolicy(policy), debug_nan=True,
    )  # fmt: skip


def feed(manager, slot, ids, start=0):
    for at in range(start, len(ids), BLOCK):
        n = min(BLOCK, len(ids) - at)
        plan = manager.plan_step([slot] * n, np.arange(at, at + n), num_segments=1, width=BLOCK)
        manager.cache = step(manager.cache, plan)
        if at + n >= manager._books.requests.pinned(slot):
            manager.keep_prefix(slot, ids[: at + n])


def book(manager):
    free = {kind: manager.num_free_blocks(kind) for kind in ("csa", "hca")}
    return manager.active_slots, free, [manager.blocks(slot) for slot in manager.active_slots]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("call", "stages"),
    [
        ("restore", ("write_entries", "write_rows", "enter_cells")),
        ("fork", ("copy_slot",)),
        ("admit_prompt", ("write_rows", "enter_cells")),
    ],
)
def test_a_call_that_the_device_refuses_loses_nothing(monkeypatch, call, stages, failure):
    """Before each of its writes, whatever was written by then."""
    manager, ids = make(), np.random.default_rng(0).integers(0, 64, 30)
    slot = manager.admit_request()
    feed(manager, slot, ids)
    argument = {"restore": manager.snapshot(slot), "fork": slot, "admit_prompt": ids}[call]
    before = book(manager)

    def refuse(*_args):
        raise failure("the device is out of memory")

    for stage in stages:
        with monkeypatch.context() as patch:
            patch.setattr(holder, stage, refuse)
            with pytest.raises(failure, match="out of memory"):
                getattr(manager, call)(argument)
        assert book(manager) == before, stage
        manager.check()
    getattr(manager, call)(argument)
    manager.check()


def test_a_rollback_of_nothing_keeps_what_a_prefix_hit_adopted():
    """While "zero" computes again, blocks beyond the length hold entries that no step writes a second time."""
    manager, ids = make("zero"), np.random.default_rng(0).integers(0, 64, 61)
    slot = manager.admit_request()
    feed(manager, slot, ids)
    manager.release_request(slot)
    hit = manager.admit_prompt(ids)
    assert 0 < hit.start < hit.hit_tokens
    before = manager.blocks(hit.slot)
    manager.rollback(hit.slot, 0)
    assert manager.blocks(hit.slot) == before
    manager.check()
