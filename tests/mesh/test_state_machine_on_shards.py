"""Requests come, go, fork and move between two shards in any order; after every move each shows what its tokens say."""

import os

import pytest
from life.machine import play
from life.shards import ShardedViews
from life.worlds import small

from dsv4_jax.ops import dispatch

MOVES = int(os.environ.get("DSV4_SHARD_MOVES", "0"))


@pytest.mark.skipif("cpu" not in dispatch.available(), reason="without native forms the last bit depends on the shapes")
def test_what_two_shards_show(mesh, say):
    """Bit for bit; DSV4_SHARD_MOVES=10000 makes at least as many moves, with other seeds."""
    world = ShardedViews(small("fp8"), mesh(2))
    moves, hits = play(world, examples=6, steps=50)
    seed = 0
    while moves < MOVES:
        more = play(world, examples=40, steps=60, seed=seed)
        moves, hits, seed = moves + more.moves, hits + more.hits, seed + 1
    say(f"{moves:,} moves on 2 shards, derandomised; {hits} prefix hits")
    assert moves >= 200
    assert hits >= 3
