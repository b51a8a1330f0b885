"""The free list."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.cache.allocator import BlockAllocator


def test_ids_are_distinct_and_come_back():
    allocator = BlockAllocator(10)
    first = allocator.acquire(6)
    assert first.dtype == np.int32
    assert len(set(first.tolist())) == 6
    assert allocator.num_free == 4
    allocator.release(first)
    assert allocator.num_free == 10
    assert sorted(allocator.acquire(10).tolist()) == list(range(10))


def test_a_shared_block_is_free_with_its_last_owner():
    allocator = BlockAllocator(4)
    ids = allocator.acquire(3)
    allocator.share(ids[:2])
    assert [allocator.owners(i) for i in range(4)] == [2, 2, 1, 0]
    allocator.release(ids)
    assert allocator.num_free == 2
    with pytest.raises(ValueError, match="shared block 2: nobody owns it"):
        allocator.share([0, 2])
    assert allocator.owners(0) == 1
    allocator.release(ids[:2])
    assert allocator.num_free == 4


def test_too_few_takes_nothing():
    allocator = BlockAllocator(4)
    allocator.acquire(3)
    with pytest.raises(RuntimeError, match=r"OOM: asked for 2 blocks, 1 of 4 are free"):
        allocator.acquire(2)
    assert allocator.num_free == 1
    assert len(allocator.acquire(1)) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 0], "block 0 twice"), ([0, 3], "block 3 twice"), ([0, 4], "released block 4"), ([-1], "released block -1")],
)
def test_bad_release_changes_nothing(ids, message):
    allocator = BlockAllocator(4)
    taken = allocator.acquire(3)
    assert taken.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=message):
        allocator.release(ids)
    assert allocator.num_free == 1
    allocator.release(taken)
    assert allocator.num_free == 4


@pytest.mark.parametrize("ids", [[0.5], ["0"], [True], 0.0, [[0], [1, 2]]])
def test_ids_must_be_integers(ids):
    allocator = BlockAllocator(4)
    allocator.acquire(4)
    with pytest.raises(ValueError, match="integer block ids"):
        allocator.release(ids)
    assert allocator.num_free == 0


@pytest.mark.parametrize("n", [-1, 1.5, True, "2"])
def test_bad_number(n):
    with pytest.raises(ValueError, match="expected"):
        BlockAllocator(4).acquire(n)
    with pytest.raises(ValueError, match="expected"):
        BlockAllocator(n)


@given(st.lists(st.integers(0, 6), max_size=30), st.randoms(use_true_random=False))
def test_every_block_is_free_or_owned_once(asks, random):
    allocator, owned = BlockAllocator(16), []
    for n in asks:
        if n <= allocator.num_free:
            owned.append(allocator.acquire(n))
        elif owned:
            allocator.release(owned.pop(random.randrange(len(owned))))
        held = [i for ids in owned for i in ids.tolist()]
        assert len(held) == len(set(held)) == 16 - allocator.num_free
        assert all(0 <= i < 16 for i in held)
