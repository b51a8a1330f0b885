"""The k best entries of those a token sees, by the score of the CSA indexer (arXiv 2606.19348, section 2.3)."""

import jax
import jax.numpy as jnp

from ..formats.fp4 import GROUP_SIZE, hadamard
from ..nn.rope import apply_rope
from ..segments import Segments, per_token, to_segments, to_tokens
from ..write.compress import IndexerKeys
from .entries import read_keys
from .select_entries import select_top_k

Array = jax.Array

PIECE_BYTES = 256 << 20
"""Bound on the products (tokens, heads, entries) float32 held at once; a single token of each request may exceed it."""


def select(
    q: Array,
    weights: Array,
    keys: IndexerKeys,
    table: Array,
    segments: Segments,
    visible: Array,
    k: int,
    *,
    format: str,
    layer: int | Array,
    max_entries: int,
    raw: tuple[Array, Array] | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Array:
    """The entries with the k best scores, of those that each token sees.

    The score of an entry is the sum over heads of weight * relu(q . key) / sqrt(d), in float32; equal scores go to the
    lower index. A token that sees at most k entries gets all of them, whatever their scores; where `max_entries` <= k
    no key is read. A score of NaN (from a NaN in the query, its weights or the key) counts as the best: what is broken
    is seen. Keys out of sight change nothing.

    A step is worked through in pieces, so that beside the keys of each request, (S, max_entries, d) float32, no more
    than `piece_bytes` of products are held: nothing of (T, max_entries) is.

    Args:
      q: (T, heads, d) floating, rotated by RoPE, not by Hadamard.
      weights: (T, heads) floating.
      keys: IndexerKeys arrays (L, N, E, ...).
      table: (R, blocks of a request) int32, -1 where no block is given: its entries are not seen.
      segments: how the tokens are grouped.
      visible: (T,) int32, a token sees entries below it; 0 for padding.
      k: how many.
      format: of the keys, "nvfp4" | "mxfp4" | "bf16" | "fp32"; against FP4 keys the query is rotated by Hadamard here.
      layer: index into L.
      max_entries: entries of a request that are looked at, a multiple of E.
      raw: cos and sin (T, r) float32 of the tokens' positions, where RoPE is still to be applied to q.
      piece_bytes: see above.

    Returns:
      (T, k) int32, in no particular order, -1 where fewer are seen.
    """
    per_block = keys.keys.shape[2]
    columns = max_entries // per_block
    given = jnp.zeros((segments.slots.shape[0], 0), bool)
    if columns:
        of_slot = table.at[jnp.maximum(segments.slots, 0)].get(mode="clip")[:, :columns]
        given = jnp.repeat((of_slot >= 0) & (segments.slots >= 0)[:, None], per_block, axis=1)
    if max_entries <= k:
        entry = jnp.arange(max_entries, dtype=jnp.int32)[None]
        seen = per_token(given, segments) & (entry < visible[:, None])
        return jnp.pad(jnp.where(seen, entry, -1), ((0, 0), (0, k - max_entries)), constant_values=-1)
    if raw is not None:
        q = apply_rope(q, raw[0][:, None], raw[1][:, None])
    q = q.astype(jnp.float32)
    if format in GROUP_SIZE:
        q = hadamard(q)
    # In terms of segments, so that the tokens of a request share the reading of its keys.
    rows = to_segments(visible, segments)
    vectors = read_keys(
        keys, table, segments.slots, jnp.max(rows, axis=1), format=format, layer=layer, max_blocks=columns
    )
    pieces = (to_segments(q, segments), to_segments(weights.astype(jnp.float32), segments), rows)

    def best(piece: tuple[Array, Array, Array]) -> Array:
        return _best(*piece, vectors, given, k)

    requests, tokens = rows.shape
    fits = max(1, piece_bytes // max(1, requests * q.shape[1] * max_entries * 4))
    if tokens <= fits:
        return _of_tokens(best(pieces), segments)
    count = -(-tokens // fits)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * fits - tokens), *((0, 0) for _ in x.shape[2:])))
        return x.reshape(requests, count, fits, *x.shape[2:]).swapaxes(0, 1)

    chosen = jax.lax.map(best, jax.tree.map(cut, pieces)).swapaxes(0, 1)
    return _of_tokens(chosen.reshape(requests, count * fits, k)[:, :tokens], segments)


def _best(q: Array, weights: Array, visible: Array, keys: Array, given: Array, k: int) -> Array:
    """q (S, C, heads, d), weights (S, C, heads), visible (S, C), keys (S, E, d), given (S, E) -> (S, C, k) int32."""
    highest = jax.lax.Precision.HIGHEST
    products = jnp.einsum("schd,sed->sche", q, keys, precision=highest)
    scores = jnp.einsum("sch,sche->sce", weights, jax.nn.relu(products), precision=highest) * q.shape[-1] ** -0.5
    # One NaN, above all numbers: the sign of another would put it below them.
    scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
    entry = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None]
    seen = given[:, None] & (entry < visible[..., None])
    flat = jnp.where(seen, scores, -jnp.inf).reshape(-1, keys.shape[1])
    index = select_top_k(flat, visible.reshape(-1), k).reshape(*visible.shape, k)
    hole = jnp.take_along_axis(given[:, None], jnp.maximum(index, 0), axis=2)
    return jnp.where(hole, index, -1)


def _of_tokens(chosen: Array, segments: Segments) -> Array:
    """(S, C, k) -> (T, k), -1 for padding."""
    return to_tokens(chosen + 1, segments) - 1
