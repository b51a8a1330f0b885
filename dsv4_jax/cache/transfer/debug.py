"""For tests and the debug mode: bytes that show when they are read, and whether host and device agree."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..host.requests import RequestTable
from ..kv_cache import KVCache
from ..paged_cache import PagedKVPool
from .slots import read_blocks, slot_shapes, write_blocks, write_slot

_BYTES = {"scale": 0xFF, "inv_scale": 0xFF, "nope": 0x7F, "keys": 0x77}  # both E4M3 and E8M0 read 0xff as NaN


def unreadable(tree: Any) -> Any:
    """numpy arrays of the shapes and dtypes in `tree` (a pool of the cache) that read back as NaN.

    FP8 values 0x7f, scales 0xff, floats NaN; FP4 has no NaN and its scales do; ring positions -1, ring heads 0.
    """

    def fill(path: tuple, x: Any) -> np.ndarray:
        name = path[-1].name
        if x.dtype == np.uint8:
            return np.full(x.shape, _BYTES[name], x.dtype)
        if x.dtype == np.int32:
            return np.full(x.shape, -1 if name == "pos" else 0, x.dtype)
        return np.full(x.shape, np.nan, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def fill_blocks(cache: KVCache, blocks: Mapping[str, Sequence[int]]) -> Iterator[KVCache]:
    """The cache with these blocks, by kind, made unreadable, after each part. Donates the pools."""
    paged = dict(cache.paged)
    for kind, ids in blocks.items():
        if ids:
            values = unreadable(_some_blocks(paged[kind], len(ids)))
            for pool in write_blocks(paged[kind], ids, values):
                paged[kind] = pool
                yield cache.replace_state(cache.state, paged, cache.block_table)


def _some_blocks(pool: PagedKVPool, n: int) -> PagedKVPool:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], n, *x.shape[2:]), x.dtype), pool)


def fill_slot(cache: KVCache, slot: int) -> KVCache:
    """The cache with ring and tails of one slot made unreadable. Donates the state."""
    return write_slot(cache, slot, unreadable(slot_shapes(cache)))


def check_blocks(cache: KVCache, blocks: Mapping[str, Sequence[int]]) -> None:
    """AssertionError unless these blocks hold what `fill_blocks` left there, to the byte."""
    for kind, ids in blocks.items():
        for part, n in read_blocks(cache.paged[kind], ids):
            host = jax.tree.map(lambda x, n=n: np.asarray(x)[:, :n], part)
            for found, expected in zip(jax.tree.leaves(host), jax.tree.leaves(unreadable(host)), strict=True):
                assert found.tobytes() == expected.tobytes(), f"somebody wrote to free {kind.upper()} blocks: {ids}"


def check_cache(
    requests: RequestTable, cache: KVCache, kept: dict[str, list[int]], *, free_is_unreadable: bool
) -> None:
    """AssertionError unless blocks, tables, lengths and ring rows fit together.

    kept: blocks by kind that are kept for prompts to come. Every block is free, waiting, or owned as often as it is
    listed; the tables list what is owned, except where a planned step has not been dispatched; ring rows hold positions
    that are theirs; with `free_is_unreadable`, nobody has written to a free block.
    """
    requests.check(kept)
    for kind, table in cache.block_table.items():
        _check_table(requests, kind, np.asarray(table))
    for kind, state in cache.state.items():
        pos = np.asarray(state.swa_pos)
        rows = np.arange(pos.shape[-1])
        impossible = (pos >= requests.max_context_len) | (pos < -1) | ((pos >= 0) & (pos % pos.shape[-1] != rows))
        assert not impossible.any(), f"{kind.upper()} ring rows claim impossible positions"
    if free_is_unreadable:
        check_blocks(cache, {kind: requests.ledger.free_blocks(kind) for kind in requests.ledger.kinds})


def _check_table(requests: RequestTable, kind: str, table: np.ndarray) -> None:
    expected = np.full(table.shape, -1, np.int32)
    for slot in requests.ledger.slots:
        ids = requests.ledger.blocks(slot)[kind]
        expected[slot, : len(ids)] = ids
    for row in range(len(table)):
        if requests.pending.involves(row):
            expected[row] = table[row]
    for released in requests.waiting:
        for row, column in released.cells[kind]:
            expected[row, column] = table[row, column]
    np.testing.assert_array_equal(table, expected, f"{kind.upper()} block table")
