"""The host's bookkeeping: slots, blocks, plans, and that a failed call changes nothing."""

import gc

import jax
import numpy as np
import pytest

from dsv4_jax import DSV4Config, KVCacheManager, build_schedule
from dsv4_jax.cache.paged_cache import PagedKVPool
from dsv4_jax.cache.state_cache import StateCachePool

SWA, CSA, HCA = 0, 1, 2


def book(manager):
    """All the host knows."""
    tables = {k: np.asarray(t).tolist() for k, t in manager.cache.block_table.items()}
    free = {k: manager.num_free_blocks(k) for k in tables}
    slots = manager.active_slots
    return slots, free, tables, [(manager.length(s), manager.blocks(s)) for s in slots]


def test_views_by_layer(make, config):
    manager = make()
    assert len(manager.paged_pools) == len(manager.state_pools) == config.num_hidden_layers
    assert [p is None for p in manager.paged_pools] == [True, False, False, False, False]
    assert all(isinstance(p, PagedKVPool) for p in manager.paged_pools if p)
    assert all(isinstance(s, StateCachePool) for s in manager.state_pools)
    assert manager.paged_pools[CSA].entries_fp8.shape == (4, 32, 448)
    assert manager.paged_pools[-1].entries_fp8.shape == (4, 1, 448)
    assert manager.state_pools[HCA].tail_ka.shape == (2, 128, 512)
    pools = sum(p.memory_bytes() for p in [*manager.paged_pools, *manager.state_pools] if p)
    tables = sum(t.nbytes for t in manager.cache.block_table.values())
    assert manager.memory_bytes() == pools + tables + manager.cache.ran.nbytes
    assert [s.schema.kind for s in manager.state_pools[:3]] == ["swa", "csa", "hca"]
    with pytest.raises(IndexError, match="layer 5"):
        manager.paged_pools[5]


def test_leaves_do_not_grow_with_the_layers(make):
    flash, pro = DSV4Config.flash(), DSV4Config.pro()
    sizes = {"max_concurrent_requests": 1, "num_blocks_per_csa_layer": 1, "num_blocks_per_hca_layer": 1}
    count = [len(jax.tree.leaves(make().cache))]
    for config in (flash, pro):
        count.append(len(jax.tree.leaves(KVCacheManager(config, build_schedule(config), **sizes).cache)))
    assert count[0] == count[1]
    assert count[2] < count[1]  # Pro has no pure SWA layer


def test_slots_in_the_order_in_which_they_became_free(make):
    manager = make(max_concurrent_requests=3)
    assert [manager.admit_request() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="concurrent"):
        manager.admit_request()
    manager.release_request(1)
    manager.release_request(0)
    assert [manager.admit_request(), manager.admit_request()] == [1, 0]


def test_release_gives_everything_back(make):
    manager = make()
    before = book(manager)
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 200, np.arange(200))
    assert manager.length(slot) == 200
    assert {k: len(v) for k, v in manager.blocks(slot).items()} == {"csa": 2, "hca": 1}
    del plan
    manager.release_request(slot)
    assert book(manager) == before
    with pytest.raises(ValueError, match="slot 0 holds no request"):
        manager.release_request(slot)


def test_allocate_block(make):
    manager = make()
    slot = manager.admit_request()
    first, second = manager.allocate_block(CSA, slot), manager.allocate_block(CSA, slot)
    assert manager.blocks(slot) == {"csa": [first, second], "hca": []}
    assert np.asarray(manager.cache.block_table["csa"])[slot].tolist() == [first, second]
    before = book(manager)
    for call, error, message in [
        (lambda: manager.allocate_block(CSA, slot), ValueError, "max_context_len = 256 allows 2"),
        (lambda: manager.allocate_block(SWA, slot), ValueError, "SWA: it has no blocks"),
        (lambda: manager.allocate_block(CSA, 1), ValueError, "slot 1 holds no request"),
        (lambda: manager.allocate_block(9, slot), ValueError, "layer 9"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert book(manager) == before


def test_exhausted_pool_changes_nothing(make):
    manager = make(num_blocks_per_csa_layer=3, num_blocks_per_hca_layer=1)
    a, b = manager.admit_request(), manager.admit_request()
    plan = manager.plan_step([a] * 200, np.arange(200))
    before = book(manager)
    with pytest.raises(RuntimeError, match=r"OOM: 2 more CSA blocks are needed, 1 are free"):
        manager.plan_step([b] * 200, np.arange(200))
    assert book(manager) == before
    # One kind has enough, the other does not: neither is touched.
    with pytest.raises(RuntimeError, match=r"OOM: 1 more HCA blocks are needed, 0 are free"):
        manager.plan_step([b] * 128, np.arange(128))
    assert book(manager) == before
    manager.allocate_block(CSA, b)
    with pytest.raises(RuntimeError, match="OOM: 1 more CSA blocks are needed, 0 are free"):
        manager.allocate_block(CSA, b)
    plan.cancel()


def test_what_is_no_integer_changes_nothing(make):
    manager = make(max_rollback=3)
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 5, np.arange(5))
    manager.cache = manager.cache.with_blocks(plan.new_blocks)
    before = book(manager)
    for other in (0.0, False, "0", None, [0]):
        for call in (manager.release_request, manager.fork, manager.length, lambda s: manager.allocate_block(CSA, s)):
            with pytest.raises(ValueError, match=r"slot is .*: expected an integer"):
                call(other)
    for n in (1.5, 1.0, True, "1", None):
        calls = (manager.rollback, manager.advance, lambda slot, n: manager.snapshot(slot, rollback=n))
        for call in calls:
            with pytest.raises(ValueError, match=f"is {n!r}: expected an integer, 0 or more"):
                call(slot, n)
    assert book(manager) == before
    manager.rollback(np.int64(slot), np.int32(1))
    assert manager.length(slot) == 4
    manager.check()


def test_the_context_that_pools_allow(make, config):
    assert make(max_context_len=None, num_blocks_per_csa_layer=3, num_blocks_per_hca_layer=1).max_context_len == 384
    none = make(max_context_len=None, num_blocks_per_csa_layer=0, num_blocks_per_hca_layer=0)
    none.plan_step([none.admit_request()] * 3, np.arange(3))  # three tokens need no block
    with pytest.raises(RuntimeError, match="OOM: 1 more CSA blocks"):
        none.plan_step([0], [3])
    windows = config.replace(num_hidden_layers=3, compress_ratios=(0, 0, 0))  # no blocks, and so no limit
    manager = make(config=windows, schedule=windows.schedule, max_context_len=None)
    manager.plan_step([manager.admit_request()], [0])
    assert manager.max_context_len == (1 << 31) - 1


@pytest.mark.parametrize(
    ("slots", "positions", "message"),
    [
        ([0, 0], [0], r"request_slots has shape \(2,\) and positions \(1,\)"),
        ([[0]], [[0]], r"shape \(1, 1\)"),
        ([0.0], [0], "request_slots is float64"),
        ([0], [0.5], "positions float64"),
        ([1], [0], "slot 1 holds no request"),
        ([-2], [0], "slot -2 holds no request"),
        ([7], [0], "slot 7 holds no request"),
        ([1 << 32], [0], "slot 4294967296 holds no request"),  # in 32 bits it is slot 0
        ([(1 << 32) - 1], [0], "slot 4294967295 holds no request"),
        ([0], [1 << 32], "positions reach from 4294967296"),
        ([0], [-1], "positions reach from -1 to -1"),
        ([0], [256], "positions reach from 256 to 256: expected 0 to 255"),
        ([0, 0], [0, 2], "expected consecutive positions"),
        ([0, 0], [3, 3], "expected consecutive positions"),
    ],
)
def test_bad_plans_change_nothing(make, slots, positions, message):
    manager = make()
    manager.admit_request()
    before = book(manager)
    for call in (manager.plan_step, lambda s, p: manager.acquire(CSA, s, p)):
        with pytest.raises(ValueError, match=message):
            call(slots, positions)
        assert book(manager) == before


def test_steps_that_do_not_fit_their_shape(make):
    manager = make()
    slot = manager.admit_request()
    with pytest.raises(ValueError, match="1 slots with up to 5 tokens: expected at most 1 slots with 4"):
        manager.plan_step([slot] * 5, np.arange(5), num_segments=1, width=4)
    sizes = {"lookahead": -1, "num_segments": -1, "width": 0, "max_blocks": 1.5}
    for name, size in sizes.items():
        with pytest.raises(ValueError, match=f"{name} is {size}: expected an integer"):
            manager.plan_step([slot] * 5, np.arange(5), **{name: size})
    assert manager.length(slot) == 0
    far = manager.plan_step([slot] * 5, np.arange(5), lookahead=1 << 40)  # no more than a request can have
    assert len(far.new_blocks["csa"]) == 1 * (256 // 128 + 2)


def test_a_bound_that_would_hide_entries(make):
    manager = make()
    slot = manager.admit_request()
    before = book(manager)
    with pytest.raises(ValueError, match="max_blocks is 1: slot 0 needs 2 blocks"):
        manager.plan_step([slot] * 140, np.arange(140), max_blocks=1)
    assert book(manager) == before
    assert manager.plan_step([slot] * 140, np.arange(140), max_blocks=2).max_blocks == 2


def test_lookahead_gives_out_what_a_loop_will_need(make):
    manager = make()
    slot = manager.admit_request()
    plan = manager.plan_step([slot], [0], lookahead=127)
    assert {k: len(v) for k, v in manager.blocks(slot).items()} == {"csa": 1, "hca": 1}
    assert sorted(row[2] for rows in plan.new_blocks.values() for row in rows.tolist() if row[0] >= 0) == [0, 0]
    assert manager.length(slot) == 1
    with pytest.raises(ValueError, match=r"limits is int64\(2,\): expected integers \(1,\), one for each token"):
        manager.plan_step([slot], [1], lookahead=300, limits=np.array([128, 128]))
    second = manager.plan_step([slot], [1], lookahead=300, limits=[128])
    assert {k: len(v) for k, v in manager.blocks(slot).items()} == {"csa": 1, "hca": 1}
    third = manager.plan_step([slot], [2], lookahead=200, limits=[300])
    assert {k: len(v) for k, v in manager.blocks(slot).items()} == {"csa": 2, "hca": 1}
    third.cancel()
    second.cancel()
    assert (manager.length(slot), {k: len(v) for k, v in manager.blocks(slot).items()}) == (1, {"csa": 1, "hca": 1})


def test_acquire_allocates_nothing(make):
    manager = make()
    slots = [manager.admit_request(), manager.admit_request()]
    manager.allocate_block(CSA, 0)
    gc.collect()
    before, live = book(manager), sum(x.nbytes for x in jax.live_arrays())
    handle = manager.acquire(CSA, np.array(slots), np.array([3, 0]), np.array([11, 12]))
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) == live
    assert book(manager) == before
    assert handle.cache is manager.cache
    assert manager.acquire(SWA, [0], [0], [0]).paged is None
    assert handle.paged.entries_fp8.shape == (4, 32, 448)
    assert handle.state.swa_fp8.shape == (2, 128, 448)


def test_request_ids(make):
    manager = make()
    manager.admit_request()
    manager.admit_request()
    # One slot per request, and for each token which request it belongs to.
    handle = manager.acquire(CSA, [1, 0], [5, 0, 6], [0, 1, 0])
    assert handle.plan.slots.tolist() == [1, 0, 1]
    for slots, positions, ids, message in [
        ([0, 1], [0, 0], [7, 7], "disagree"),
        ([0, 0], [0, 1], [7, 8], "disagree"),
        ([0, 1], [0, 0, 1], [0, 1, 2], "there are 2 request_slots"),
        ([0, 1], [0, 0], [0], "one for each of the 2 positions"),
        ([0, 1], [0, 0], [0.0, 1.0], "expected integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            manager.acquire(CSA, slots, positions, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrent_requests": 0}, "max_concurrent_requests is 0"),
        ({"max_context_len": 0}, "max_context_len is 0"),
        ({"num_blocks_per_csa_layer": -1}, "num_blocks_per_csa_layer is -1"),
        ({"cache_dtype": "int8"}, "cache_dtype 'int8'"),
        ({"cache_dtype": ["fp8"]}, r"cache_dtype \['fp8'\] is not known"),
        ({"max_concurrent_requests": 2.0}, "max_concurrent_requests is 2.0: expected an integer, 1 or more"),
        ({"max_context_len": 1 << 31}, "max_context_len is 2147483648: expected an integer from 1 to 2147483647"),
        ({"schedule": ()}, "schedule has no layers"),
        ({"prefix": "full"}, "prefix is 'full': expected a PrefixPolicy"),
    ],
)
def test_bad_managers(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
