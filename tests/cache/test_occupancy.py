"""What `occupancy` says of a cache is what its arrays hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.occupancy import occupancy

SWA, CSA, HCA = 0, 1, 2
LENGTHS = (9, 200, 256)


@jax.jit
def fill(cache, plan, compressors):
    """Every vector of a step's tokens is filled with position + 1, in all lanes and kinds of layers."""
    cache, tokens = cache.with_blocks(plan.new_blocks), len(plan.slots)
    values = (plan.positions + 1).astype(jnp.float32)[:, None]
    for layer, lanes in ((SWA, 0), (CSA, 2), (HCA, 1)):
        handle = LayerCacheHandle(cache, plan, layer).write_swa(jnp.broadcast_to(values, (tokens, 512)))
        if lanes:
            kv = jnp.broadcast_to(values, (tokens, lanes * 512))
            handle = handle.write_compressed(kv, kv, compressors[layer])
        cache = handle.cache
    return cache


@pytest.fixture
def filled(make, weights):
    """A manager whose slots hold 9, 200 and 256 tokens."""
    manager = make(
        max_concurrent_requests=4, cache_dtype="fp32", num_blocks_per_csa_layer=6, num_blocks_per_hca_layer=6
    )
    slots = [manager.admit_request() for _ in LENGTHS]
    compressors = {CSA: weights(4, 512, 2), HCA: weights(128, 512, 1)}
    for start in range(0, 256, 64):
        tokens = [(s, p) for s, n in zip(slots, LENGTHS, strict=True) for p in range(start, min(start + 64, n))]
        tokens += [(-1, 0)] * (192 - len(tokens))
        where, positions = np.array(tokens, np.int32).T
        plan = manager.plan_step(where, positions, num_segments=3, width=64)
        manager.cache = fill(manager.cache, plan, compressors)
    return manager


def test_rows_and_blocks_are_those_of_the_arrays(filled):
    state = occupancy(filled)
    assert [slot.length for slot in state.slots] == list(LENGTHS)
    pools = {pool.kind: pool for pool in state.pools}
    for slot in state.slots:
        states = [jax.tree.map(np.asarray, filled.state_pools[layer]) for layer in (SWA, CSA, HCA)]
        rings = [state.swa_rope[slot.slot, :, 0] for state in states]
        arrays = {
            "ring": rings[0],
            "csa": states[CSA].tail_kb[slot.slot, :, 0],
            "csa lane a": states[CSA].tail_ka[slot.slot, :, 0],
            "hca": states[HCA].tail_ka[slot.slot, :, 0],
        }
        for ring in rings[1:]:
            np.testing.assert_array_equal(ring, rings[0])
        for rows in (slot.ring, *slot.tails):
            got, said = arrays.pop(rows.name), np.array(rows.positions)
            assert got.shape == said.shape
            np.testing.assert_array_equal(got[said >= 0], said[said >= 0] + 1, err_msg=f"{slot.slot} {rows.name}")
            if rows.name == "ring":
                np.testing.assert_array_equal(got[said < 0], 0)
        assert not arrays
        for kind, layer in (("csa", CSA), ("hca", HCA)):
            entries = np.asarray(filled.paged_pools[layer].entries_rope)[..., 0]
            table = np.asarray(filled.cache.block_table[kind])[slot.slot]
            assert tuple(table[table >= 0].tolist()) == slot.blocks[kind]
            for block in slot.blocks[kind]:
                assert pools[kind].owners[block] == (slot.slot,)
                assert np.count_nonzero(entries[block]) == pools[kind].filled[block]
            assert sum(pools[kind].filled[block] for block in slot.blocks[kind]) == slot.entries[kind]


def test_who_owns_what_after_a_fork_and_a_release(filled):
    target = filled.fork(2)  # 256 tokens: both its blocks are full
    pools = {pool.kind: pool for pool in occupancy(filled).pools}
    assert [owners for owners in pools["hca"].owners if len(owners) > 1] == [(2, target)] * 2
    filled.release_request(2)
    state = occupancy(filled)
    assert [slot.slot for slot in state.slots] == [0, 1, target]
    for pool in state.pools:
        assert all(len(owners) < 2 for owners in pool.owners)
        assert sum(not owners for owners in pool.owners) == filled.num_free_blocks(pool.kind)


def test_an_empty_cache(make):
    state = occupancy(make())
    assert state.slots == ()
    assert {pool.kind: set(pool.owners) for pool in state.pools} == {"csa": {()}, "hca": {()}}
