"""Whether what the host believes and what the device holds fit together. Reads the device: for tests."""

import numpy as np

from ..host.requests import RequestTable
from ..kv_cache import KVCache
from .debug import check_blocks


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
