"""The k best entries of those a token sees, by the score of the CSA indexer (arXiv 2606.19348, section 2.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..every_layer import attribute, is_static, slots_of, table_of
from ..formats.fp4 import GROUP_SIZE, hadamard
from ..nn.rope import apply_rope
from ..segments import Segments, StepTokens, per_token, to_segments, to_tokens
from ..write.compress import IndexerKeys
from .attend import CUDA_CAPABILITY, compute_capability
from .entries import read_keys
from .select_entries import select_top_k

Array = jax.Array

PIECE_BYTES = 256 << 20
"""Bound on the products (tokens, heads, entries) float32 that the jax.numpy form holds at once; a single token of each
request may exceed it."""

SCORE_BYTES = 64 << 20
"""Bound on the scores (tokens, entries) float32 that the native forms hold at once; a single token may exceed it."""

MAX_HEADS, MAX_K = 64, 2048
"""What the CUDA form takes."""

GROUP = 16
"""Entries whose best score the CUDA form keeps beside the scores."""


class Operands(NamedTuple):
    """The arrays of `select`."""

    q: Array
    weights: Array  # float32
    tokens: StepTokens
    keys: IndexerKeys
    raw: tuple[Array, Array] | None


class Rule(NamedTuple):
    """What of a layer a token of `select` sees, and how much it takes. Static, but for the layer."""

    k: int
    format: str
    layer: int | Array
    ratio: int
    max_entries: int


def select(
    q: Array,
    weights: Array,
    tokens: StepTokens,
    keys: IndexerKeys,
    k: int,
    *,
    format: str,
    layer: int | Array,
    ratio: int,
    max_entries: int | None = None,
    raw: tuple[Array, Array] | None = None,
    piece_bytes: int = PIECE_BYTES,
    implementation: str | None = None,
) -> Array:
    """The entries with the k best scores, of those that each token sees.

    The score of an entry is the sum over heads of weight * relu(q . key) / sqrt(d); equal scores go to the lower index.
    A token at position p sees the entries e < (p + 1) // ratio that have a block. One that sees at most k of them gets
    all, whatever their scores, and no key is read for it. A score of NaN counts as the best: what is broken is seen. It
    comes from a NaN key, and from anything in the query or its weights that is not finite. Keys out of sight change
    nothing. A token of slot -1 or out of range, or of a negative position, is padding and sees nothing.

    Numbers: scores in float32 in "jnp" and "cpu"; in "cuda" the products are of 16 bits, and a score is within 2e-3 of
    exact arithmetic on the stored keys, relative to the token's largest: only among scores that close does it choose
    differently. In "cpu" and "cuda" a token's choice depends on the shapes of the call and on what it sees: not on the
    other tokens, their order, padding or the run.

    Memory beside the result: in "cpu" and "cuda" scores of SCORE_BYTES; in "jnp" the keys of each request as float32
    and products of `piece_bytes`. Nothing of (T, max_entries) is held but for a T that fits.

    Args:
      q: (T, heads, d) float32 | bfloat16, rotated by RoPE, not by Hadamard.
      weights: (T, heads) floating.
      tokens: slots, positions, segments and table; entries of a block that is not given are not seen.
      keys: IndexerKeys arrays (L, N, E, ...).
      k: how many.
      format: of the keys, "nvfp4" | "mxfp4" | "bf16" | "fp32"; against FP4 keys the query is rotated by Hadamard here.
      layer: index into L; an array () int32 must be one.
      ratio: tokens per entry.
      max_entries: entries of a request that are looked at, a static bound, a multiple of E; by default all.
      raw: cos and sin (T, r) float32 of the tokens' positions, where RoPE is still to be applied to q.
      piece_bytes: see above.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one that serves.

    Returns:
      (T, k) int32, -1 where fewer are seen; by index in "cpu" and "cuda", in no particular order in "jnp".

    Raises:
      ValueError: for a layer, ratio or k out of range, and for an implementation that cannot be used.
    """
    layers, _, per_block = keys.keys.shape[:3]
    num_slots, columns = tokens.blocks.shape
    if is_static(layer) and not 0 <= layer < layers:
        raise ValueError(f"select: got layer {layer}; keys has layers 0 to {layers - 1}")
    if ratio < 1 or k < 1:
        raise ValueError(f"select: got ratio {ratio} and k {k}; expected at least 1")
    most = columns * per_block
    max_entries = most if max_entries is None else min(max_entries, most)
    weights = weights.astype(jnp.float32)

    rule = Rule(k, format, layer, ratio, max_entries)

    def in_jnp(given: Operands) -> Array:
        return _in_jnp(given, rule, piece_bytes, "jnp" if implementation == "jnp" else None)

    def in_native(given: Operands) -> Array:
        q, weights, tokens, keys, angles = given
        table = table_of(tokens.blocks, layer, *keys.keys.shape[:2])
        slots = slots_of(tokens.slots, layer, num_slots)
        results = [jax.ShapeDtypeStruct((q.shape[0], k), jnp.int32)]
        if max_entries > k:  # room for scores, and for the best of every few
            row = -(-max_entries // 64) * (64 + 64 // GROUP)
            fits = max(1, min(q.shape[0], SCORE_BYTES // (4 * row)))
            results.append(jax.ShapeDtypeStruct((fits, row), jnp.uint32))
        numbers = {"ratio": ratio, "k": k, "max_entries": max_entries, "raw": raw is not None}
        call = dispatch.ffi_call("dsv4_select", results)
        return call(
            *jax.tree.leaves((q, weights, slots, tokens.positions, keys, table, angles)),
            layer=attribute(layer),
            **{name: np.int64(x) for name, x in numbers.items()},
        )[0]

    return dispatch.call(
        "select",
        implementation,
        lambda platform: _native_limit(platform, q, keys, format, k, raw),
        in_native,
        in_jnp,
        Operands(q, weights, tokens, keys, raw),
    )


def _native_limit(
    platform: str, q: Array, keys: IndexerKeys, format: str, k: int, raw: tuple[Array, Array] | None
) -> str | None:
    """What keeps the native form for "cpu" or "cuda" from serving; None if nothing does."""
    if format not in GROUP_SIZE:
        return f"it reads only FP4 keys, not {format}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes queries of float32 or bfloat16, not {q.dtype}"
    if platform != "cuda":
        return None
    if q.shape[2] != 128:
        return f"it reads only keys of 128 values, not {q.shape[2]}"
    for name, got, most in (("heads", q.shape[1], MAX_HEADS), ("k", k, MAX_K)):
        if got > most:
            return f"it takes {name} up to {most}, not {got}"
    per_block = keys.keys.shape[2]
    if per_block < GROUP or per_block & (per_block - 1):
        return f"it takes blocks of a power of two of entries, from {GROUP} on, not {per_block}"
    if raw is not None and raw[0].shape[-1] != 32:
        return f"it takes 32 angles of a token, not {raw[0].shape[-1]}"
    found = compute_capability()
    if found != CUDA_CAPABILITY:
        return f"it needs a GPU of compute capability {CUDA_CAPABILITY}, not {found or 'none'}"
    return None


def _in_jnp(given: Operands, rule: Rule, piece_bytes: int, readers: str | None) -> Array:
    """See `select`; `readers`: how keys are read."""
    q, weights, (slots, positions, _, _), keys, raw = given
    table, segments = given.tokens.blocks, given.tokens.grouped
    k, format, layer, ratio, max_entries = rule
    per_block = keys.keys.shape[2]
    columns = max_entries // per_block
    live = (slots >= 0) & (slots < table.shape[0]) & (positions >= 0)
    visible = jnp.where(live, jnp.minimum((positions + 1) // ratio, max_entries), 0)
    has_block = jnp.zeros((segments.slots.shape[0], 0), bool)
    if columns:
        of_slot = table.at[jnp.maximum(segments.slots, 0)].get(mode="clip")[:, :columns]
        has_block = jnp.repeat((of_slot >= 0) & (segments.slots >= 0)[:, None], per_block, axis=1)
    if max_entries <= k:
        entry = jnp.arange(max_entries, dtype=jnp.int32)[None]
        seen = per_token(has_block, segments) & (entry < visible[:, None])
        return jnp.pad(jnp.where(seen, entry, -1), ((0, 0), (0, k - max_entries)), constant_values=-1)
    # What is not finite is NaN: the sums of an infinity depend on their order.
    q, weights = (jnp.where(jnp.isfinite(x), x, jnp.nan).astype(jnp.float32) for x in (q, weights))
    if raw is not None:
        q = apply_rope(q, raw[0][:, None], raw[1][:, None])
    if format in GROUP_SIZE:
        q = hadamard(q)
    # In terms of segments, so that the tokens of a request share the reading of its keys.
    rows = to_segments(visible, segments)
    vectors = read_keys(
        keys, table, segments.slots, jnp.max(rows, axis=1), format=format, layer=layer, max_blocks=columns,
        implementation=readers,
    )  # fmt: skip
    pieces = (to_segments(q, segments), to_segments(weights, segments), rows)

    def best(piece: tuple[Array, Array, Array]) -> Array:
        return _best(*piece, vectors, has_block, k)

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
