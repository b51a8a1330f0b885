"""Requests come, go, fork and move between two shards in any order; after every move each shows what its tokens say."""

import os

import pytest
from life.machine import play
from life.shards import ShardedViews
from life.worlds import small

from dsv4_jax.ops import dispatch

MOVES = int(os.environ.get("DSV4_SHARD_MOVES", "10000"))


@pytest.mark.skipif("cpu" not in dispatch.available(), reason="without native forms the last bit depends on the shapes")
def test_what_two_shards_show(mesh, say):
    """Bit for bit, DSV4_SHARD_MOVES moves at least: always the same ones."""
    world = ShardedViews(small("fp8"), mesh(2))
    moves = hits = sessions = 0
    while moves < MOVES:
        played = play(world, examples=25, steps=60, seed=sessions)
        moves, hits, sessions = moves + played.moves, hits + played.hits, sessions + 25
    say(f"{moves:,} moves on 2 shards in {sessions} sessions; {hits} prefix hits")
    assert hits >= 3
