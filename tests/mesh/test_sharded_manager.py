"""Requests on several shards: where they go, what they may do, and that a refusal changes nothing on any."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupt import Interrupt

import dsv4_jax
from dsv4_jax import PrefixPolicy, cache_cost, occupancy
from dsv4_jax.cache.sharding import join_caches, shard_devices, split_cache


def book(manager):
    """All that the host knows, of all shards."""
    slots = manager.active_slots
    return slots, [(manager.length(s), manager.blocks(s)) for s in slots], [
        shard.num_free_blocks(kind) for shard in manager.shards for kind in ("csa", "hca")
    ]  # fmt: skip


def written(manager, seed=0):
    """Other bytes everywhere but in tables and positions."""
    rng = np.random.default_rng(seed)

    def fill(x):
        return x if x.dtype == jnp.int32 else jax.device_put(jnp.asarray(rng.normal(size=x.shape), x.dtype), x.sharding)

    cache = manager.cache
    manager.cache = cache.replace_state(
        jax.tree.map(fill, cache.state), jax.tree.map(fill, cache.paged), cache.block_table
    )


def bring(manager, lengths):
    """Plans a step that brings lengths[slot] tokens, and takes it as run: tables get their blocks."""
    width = max(lengths.values())
    shards, slots = manager.num_shards, manager.slots_per_shard
    where, positions = np.full((shards, slots * width), -1), np.zeros((shards, slots * width), int)
    used = [0] * shards
    for slot, n in lengths.items():
        shard = manager.shard_of(slot)
        here = np.s_[shard, used[shard] : used[shard] + n]
        where[here], positions[here] = slot, manager.length(slot) + np.arange(n)
        used[shard] += n
    plan = manager.plan_step(where.reshape(-1), positions.reshape(-1), num_segments=slots, width=width)
    parts = split_cache(manager.cache, manager.mesh)
    rows = np.split(np.asarray(plan.new_blocks.rows), shards)
    news = [replace(plan.new_blocks, rows=own) for own in rows]
    manager.cache = join_caches([part.with_blocks(new) for part, new in zip(parts, news, strict=True)], manager.mesh)
    return plan


def test_parts_and_whole_are_the_same_memory(make_manager):
    manager = make_manager(4)
    whole = manager.cache
    assert manager.cache is whole
    for i, part in enumerate(split_cache(whole, manager.mesh)):
        (device,) = shard_devices(manager.mesh)[i]
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(manager.shards[i].cache), strict=True):
            assert x.unsafe_buffer_pointer() == y.unsafe_buffer_pointer()
            assert x.devices() == {device}
    assert whole.max_requests == 8
    assert manager.memory_bytes() == whole.memory_bytes()
    with pytest.raises(ValueError, match=r"^manager.cache got a cache of another size or form: expected the cache"):
        manager.cache = manager.shards[0].cache
    with pytest.raises(ValueError, match=r"^manager.cache got a cache that lies elsewhere than on its mesh, slots and"):
        manager.cache = jax.device_put(whole, jax.devices()[0])
    assert manager.cache is whole


def test_what_makes_no_shards(config, mesh):
    def make(slots=2):
        return dsv4_jax.KVCacheManager.create(
            config.geometry, max_concurrent_requests=slots, max_context_len=64, cache_dtype="fp32"
        )

    over, one, slots = dsv4_jax.ShardedKVCacheManager.over, make(), iter((1, 2))
    where = {x.devices().pop() for x in jax.tree.leaves(one.cache)}
    for made, message in (
        (one, "make is a KVCacheManager: expected a function"),
        (lambda: None, "make returned a NoneType: expected a KVCacheManager for each"),
        (lambda: one.cache, "make returned a KVCache: expected"),
        (lambda: one, "make returned a manager that it had returned before: expected another"),
        (lambda: make(next(slots)), "make returned managers of different sizes: expected the same"),
    ):
        with pytest.raises(ValueError, match=f"^over: {message}"):
            over(mesh(2), made)
    assert {x.devices().pop() for x in jax.tree.leaves(one.cache)} == where


def test_requests_spread_and_slots_know_their_request(make_manager):
    manager = make_manager(2)
    slots = [manager.admit_request() for _ in range(4)]
    assert slots == [0, 2, 1, 3]
    with pytest.raises(RuntimeError, match=r"^shard 0: all 2 concurrent requests are running: release one"):
        manager.admit_request()
    manager.release_request(slots[1])
    again = manager.admit_request()
    assert again == slots[1] == 2
    for call in (manager.release_request, manager.length, manager.fork, manager.snapshot):
        with pytest.raises(ValueError, match=r"^shard 1: slot 0 was released and has been given out again"):
            call(slots[1])
    with pytest.raises(ValueError, match=r"^slot 4 holds no request: this manager has 4 slots"):
        manager.length(4)
    with pytest.raises(ValueError, match=r"^shard is 2: expected a number from 0 to 1"):
        manager.admit_request(shard=2)
    manager.check()


def test_a_step_is_planned_on_all_shards_or_on_none(make_manager):
    manager = make_manager(2, num_blocks_per_csa_layer=3, num_blocks_per_hca_layer=3)
    a, b, c = (manager.admit_request(shard=shard) for shard in (0, 1, 1))
    plan = bring(manager, {a: 13, b: 24, c: 1})
    assert plan.slots.shape == (96,)
    assert sorted(set(plan.slots[:48])) == [-1, 0]
    assert sorted(set(plan.slots[48:])) == [-1, 0, 1]
    assert [manager.length(slot) for slot in (a, b, c)] == [13, 24, 1]
    manager.check()
    before = book(manager)
    # Shard 0 has room for its part and shard 1 has not.
    one = {a: 12, b: 5, c: 7}
    with pytest.raises(RuntimeError, match=r"^shard 1: OOM: 2 more CSA blocks are needed, 1 are free"):
        bring(manager, one)
    assert book(manager) == before
    for slots, positions, message in (
        ([a, b], [13, 23], r"^shard 1: slot 0 brings position 23 and has 24 tokens"),
        ([b, -1], [24, 0], r"^token 0 is of slot 2: expected one of shard 0, whose slots are 0 to 1$"),
        ([a], [13], r"as many tokens for each of 2 shards$"),
        ([a, 7], [13, 0], r"^token 1 is of slot 7: expected one of shard 1, whose slots are 2 to 3$"),
    ):
        with pytest.raises(ValueError, match=message):
            manager.plan_step(np.array(slots), np.array(positions))
        assert book(manager) == before
    assert manager.plan_step([], [], num_segments=2, width=3).slots.shape == (0,)  # as of one device
    manager.check()


def test_occupancy_of_all_shards(make_manager):
    manager = make_manager(2)
    a, b = (manager.admit_request(shard=shard) for shard in (0, 1))
    bring(manager, {a: 13, b: 24})
    state = occupancy(manager)
    assert [(s.slot, s.length) for s in state.slots] == [(0, 13), (2, 24)]
    csa, hca = state.pools
    assert len(csa.owners) == len(hca.owners) == 16
    for s in state.slots:
        for pool in state.pools:
            shard = s.slot // 2
            assert [block // 8 for block in s.blocks[pool.kind]] == [shard] * len(s.blocks[pool.kind])
            assert [pool.owners[block] for block in s.blocks[pool.kind]] == [(s.slot,)] * len(s.blocks[pool.kind])
            assert sum(map(bool, pool.owners[8 * shard : 8 * shard + 8])) == len(s.blocks[pool.kind])
    assert sum(csa.filled) == 13 // 4 + 24 // 4


def test_outstanding_plans_hold_what_is_released(make_manager):
    manager = make_manager(2)
    a, b = manager.admit_request(), manager.admit_request()
    plan = manager.plan_step([a, b], [0, 0])
    manager.release_request(b)
    with pytest.raises(ValueError, match=r"^shard 0: slot 0 has a planned step that was not dispatched"):
        manager.fork(a)
    assert manager.admit_request(shard=1) == 3, "slot 2 waits for the plan"
    del plan  # it cannot come any more
    assert manager.admit_request(shard=1) == 2


def test_a_request_moves_between_shards_and_managers(make_manager):
    manager, single = make_manager(2, max_rollback=2), make_manager(0, max_rollback=2)
    slot = manager.admit_request(shard=0)
    bring(manager, {slot: 29})
    written(manager)
    taken = manager.preempt(slot, rollback=2)
    there = manager.restore(taken, shard=1)
    assert manager.shard_of(there) == 1
    alone = single.restore(manager.snapshot(there, rollback=2))
    back = manager.restore(single.snapshot(alone, rollback=2))
    assert manager.shard_of(back) == 0, "the least load"
    for got in (manager.snapshot(back, rollback=2), manager.snapshot(there, rollback=2)):
        assert (got.length, got.rollback) == (29, 2)
        assert {name: x.tobytes() for name, x in got.arrays.items()} == {
            name: x.tobytes() for name, x in taken.arrays.items()
        }
    fork = manager.fork(back)
    assert manager.shard_of(fork) == 0
    manager.rollback(fork, 2)
    assert (manager.length(fork), manager.length(back)) == (27, 29)
    manager.check()


def test_a_prompt_goes_where_its_beginning_is(make_manager):
    manager = make_manager(2, prefix=PrefixPolicy("full"))
    text = np.arange(30)
    busy = manager.admit_request(shard=0)
    slot = manager.admit_request(shard=1)
    bring(manager, {slot: 24})
    written(manager)
    assert manager.keep_prefix(slot, text[:24]) == 24
    manager.release_request(busy)
    assert manager.by_load() == [0, 1]
    assert manager.by_prefix(text) == [1, 0]
    found = manager.admit_prompt(text)
    assert (manager.shard_of(found.slot), found.start) == (1, 24)
    # Its shard is full: elsewhere it is read from its beginning.
    other = manager.admit_prompt(text)
    assert (manager.shard_of(other.slot), other.start) == (0, 0)
    manager.check()


def test_reset_begins_anew_where_the_shards_are(make_manager):
    manager = make_manager(2)
    old = manager.admit_request()
    jax.tree.map(lambda x: x.delete(), manager.cache)
    manager.reset()
    assert manager.active_slots == []
    with pytest.raises(ValueError, match="this handle's request has ended"):
        manager.length(old)
    for shard, devices in zip(manager.shards, shard_devices(manager.mesh), strict=True):
        assert all(x.devices() == set(devices) for x in jax.tree.leaves(shard.cache))
    manager.check()


@pytest.mark.parametrize("name", ["admit_request", "admit_prompt", "fork", "restore"])
def test_a_request_that_nobody_got_is_none(make_manager, name):
    """Ctrl-C at every other moment at which Python hears it in the cache: who gets no slot has begun no request."""
    manager = make_manager(2, max_rollback=1)
    first = manager.admit_request()
    bring(manager, {first: 10})
    snapshot, before = manager.snapshot(first), book(manager)
    call = {
        "admit_request": manager.admit_request,
        "admit_prompt": lambda: manager.admit_prompt(np.arange(20)),
        "fork": lambda: manager.fork(first),
        "restore": lambda: manager.restore(snapshot),
    }[name]
    folder = pathlib.Path(dsv4_jax.cache.__file__).parent
    for _ in range(2):  # the first settles what there was to settle
        with Interrupt(folder) as watch:
            came = call()
        manager.release_request(came.slot if name == "admit_prompt" else came)
    places = {}
    for n, (path, *place) in enumerate(watch.places, 1):
        if path.endswith("sharded_manager.py"):
            places.setdefault(tuple(place), n)
    assert len(places) > 5
    for place, at in places.items():
        with pytest.raises(KeyboardInterrupt), Interrupt(folder, at):
            call()
        assert book(manager) == before, place


def test_shards_on_cpus_share_the_memory_of_the_machine(model, monkeypatch):
    one = cache_cost(model(0).config, model(0).config.schedule).size(1, 96).total_bytes
    monkeypatch.setattr("dsv4_jax.decode.memory.device_memory", lambda: 3 * one)
    assert dsv4_jax.make_manager(model(2), 2, 96).slots_per_shard == 1
    with pytest.raises(ValueError, match=r"^a cache for 1 requests of 96 tokens on each of 4 CPU devices takes"):
        dsv4_jax.make_manager(model(4), 4, 96)
    for n in (0, 2):
        with pytest.raises(ValueError, match=r"^max_concurrent_requests is '4': expected an integer from 1 to"):
            dsv4_jax.make_manager(model(n), "4", 96)
