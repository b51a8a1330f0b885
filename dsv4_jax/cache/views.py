"""What a layer reads from its cache."""

from typing import NamedTuple

import jax

Array = jax.Array


class SWAView(NamedTuple):
    """The sliding window of every token. S segments (S = T in a decode step), N rows, T tokens."""

    kv: Array  # (S, N, head_dim), zero where no token of the segment sees the row
    positions: Array  # (S, N) int32, -1 where the row holds nothing
    valid: Array  # (T, N) bool: whether the token sees the row of its segment


class ClassicalView(NamedTuple):
    """Compressed entries: all of a request (shared by its segment), or those selected for each token."""

    kv: Array  # (S, E, head_dim), or (T, K, head_dim) when selected
    positions: Array  # (S, E) or (T, K) int32: position of the entry's first token, -1 where there is no entry
    valid: Array  # (T, E) or (T, K) bool: whether the token sees it


class IndexerView(NamedTuple):
    """Indexer keys of all entries of a request."""

    keys: Array  # (S, E, index_head_dim) float32
    positions: Array  # (S, E) int32, -1 where there is no entry
    valid: Array  # (T, E) bool
