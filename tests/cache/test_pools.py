"""The pools as pytrees: names, shapes, bytes."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import DSV4Config, build_schedule
from dsv4_jax.cache.paged_cache import PagedKVPool
from dsv4_jax.cache.schema import build_schema
from dsv4_jax.cache.state_cache import StateCachePool

FLASH = DSV4Config.flash()
SWA, CSA, HCA = (build_schedule(FLASH)[i] for i in (0, 2, 3))


def held(pool):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))


def test_csa_pool():
    pool = PagedKVPool(build_schema(FLASH, CSA), 6)
    assert (pool.entries_fp8.shape, pool.entries_fp8.dtype) == ((6, 32, 448), jnp.uint8)
    assert (pool.entries_rope.shape, pool.entries_rope.dtype) == ((6, 32, 64), jnp.bfloat16)
    assert (pool.inv_scale.shape, pool.inv_scale.dtype) == ((6, 32), jnp.float32)
    assert (pool.indexer_keys_fp4.shape, pool.indexer_keys_fp4.dtype) == ((6, 32, 64), jnp.uint8)
    assert (pool.indexer_scale.shape, pool.indexer_scale.dtype) == ((6, 32, 8), jnp.uint8)
    assert pool.memory_bytes() == held(pool) == 6 * 32 * (448 + 128 + 4 + 64 + 8)


def test_hca_pool():
    pool = PagedKVPool(build_schema(FLASH, HCA), 6)
    assert pool.entries_fp8.shape == (6, 1, 448)
    assert pool.indexer_keys_fp4 is None
    assert pool.memory_bytes() == held(pool) == 6 * (448 + 128 + 4)


def test_swa_has_no_pool():
    with pytest.raises(ValueError, match="SWA layer has no entries"):
        PagedKVPool(build_schema(FLASH, SWA), 6)


@pytest.mark.parametrize(
    ("cache", "indexer", "per_block"),
    [
        ("fp8", "mxfp4", 32 * (580 + 68)),
        ("fp8", "nvfp4", 32 * (580 + 72)),
        ("bf16", None, 32 * (1024 + 256)),
        ("fp32", None, 32 * (2048 + 512)),
    ],
)
def test_formats_cost_what_they_say(cache, indexer, per_block):
    pool = PagedKVPool(build_schema(FLASH, CSA, cache_dtype=cache, indexer_dtype=indexer), 3)
    assert pool.memory_bytes() == held(pool) == 3 * per_block
    assert (pool.entries_fp8 is None) == (pool.inv_scale is None) == (cache != "fp8")


@pytest.mark.parametrize("spec", [SWA, CSA, HCA], ids=["swa", "csa", "hca"])
def test_state(spec):
    state = StateCachePool(build_schema(FLASH, spec), 4)
    assert (state.swa_fp8.shape, state.swa_fp8.dtype) == ((4, 128, 448), jnp.uint8)
    assert (state.swa_rope.shape, state.swa_rope.dtype) == ((4, 128, 64), jnp.bfloat16)
    assert (state.swa_inv_scale.shape, state.swa_pos.shape, state.swa_head.shape) == ((4, 128), (4, 128), (4,))
    tails = [state.tail_ka, state.tail_za, state.tail_kb, state.tail_zb, state.tail_len]
    shapes = [None if t is None else t.shape for t in tails]
    expected = {
        SWA: [None] * 5,
        CSA: [(4, 8, 512), (4, 8, 512), (4, 4, 512), (4, 4, 512), (4,)],
        HCA: [(4, 128, 512), (4, 128, 512), None, None, (4,)],
    }
    assert shapes == expected[spec]
    assert (state.indexer_tail is not None) == (spec is CSA)
    assert state.memory_bytes() == held(state)


def test_reset_slot():
    state = StateCachePool(build_schema(FLASH, CSA), 3)
    ring = state.ring
    used = state.replace(ring=ring._replace(pos=ring.pos.at[:].set(9), head=ring.head.at[:].set(10)))
    reset = used.reset_slot(1)
    assert reset.swa_pos[1].tolist() == [-1] * 128
    assert reset.swa_head.tolist() == [10, 0, 10]
    assert reset.tail_len.tolist() == [2, 0, 2]
    assert (reset.swa_pos[0] == 9).all()
    with pytest.raises(ValueError, match="slot is 3: expected an integer from 0 to 2"):
        state.reset_slot(3)
    inside = jax.jit(StateCachePool.reset_slot)
    for slot, expected in ((1, reset), (3, used), (-1, used)):
        assert inside(used, slot).swa_pos.tolist() == expected.swa_pos.tolist()
        assert inside(used, slot).swa_head.tolist() == expected.swa_head.tolist()


def test_pools_are_pytrees():
    for pool in (PagedKVPool(build_schema(FLASH, CSA), 2), StateCachePool(build_schema(FLASH, HCA), 2)):
        leaves, structure = jax.tree.flatten(pool)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(pool)
        assert again.schema == pool.schema
        assert jax.jit(lambda p: p)(pool).memory_bytes() == pool.memory_bytes()


@pytest.mark.parametrize(
    ("make", "message"), [(PagedKVPool, "num_blocks is -1"), (StateCachePool, "max_requests is -1")]
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make(build_schema(FLASH, CSA), -1)
    with pytest.raises(ValueError, match=r"is 2\.0: expected an integer"):
        make(build_schema(FLASH, CSA), 2.0)
