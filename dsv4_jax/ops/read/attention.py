"""Attention of one query head group over cached vectors, with a sink (arXiv 2606.19348, section 2.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..segments import Segments, to_segments, to_tokens

Array = jax.Array

_HIGHEST = jax.lax.Precision.HIGHEST


class KeyGroup(NamedTuple):
    """Vectors that serve as keys and as values, and who may see them.

    Vectors that no token of their segment may see must be finite (the views of the cache give zeros).
    """

    kv: Array  # (S, N, d) shared by the tokens of a segment, or (T, N, d)
    valid: Array  # (T, N) bool
    per_token: bool = False  # kv is (T, N, d): every token brings vectors of its own


def _scores(q: Array, group: KeyGroup, segments: Segments) -> Array:
    """q (S, C, H, d) -> (S, C, H, N)."""
    kv = group.kv.astype(q.dtype)
    if group.per_token:
        return to_segments(_few_by_many(to_tokens(q, segments), kv), segments)
    rows = q.reshape(q.shape[0], -1, q.shape[-1])  # the tokens and heads of a segment are rows of one product
    few = segments.tokens.shape[1] == 1
    scores = _few_by_many(rows, kv) if few else jnp.einsum("smd,snd->smn", rows, kv, precision=_HIGHEST)
    return scores.reshape(*q.shape[:-1], -1)


def _few_by_many(q: Array, kv: Array) -> Array:
    """q (S, few, d) . kv (S, N, d) -> (S, few, N).

    XLA:CPU is faster with the long side first, unless it joins the transposition to the product.
    """
    scores = jnp.einsum("snd,smd->snm", kv, q, precision=_HIGHEST)
    return jax.lax.optimization_barrier(scores).swapaxes(1, 2)


def _weighted(p: Array, group: KeyGroup, segments: Segments) -> Array:
    """p (S, C, H, N) -> (S, C, H, d)."""
    kv = group.kv.astype(p.dtype)
    if group.per_token:
        out = jnp.einsum("thn,tnd->thd", to_tokens(p, segments), kv, precision=_HIGHEST)
        return to_segments(out, segments)
    out = jnp.einsum("smn,snd->smd", p.reshape(p.shape[0], -1, p.shape[-1]), kv, precision=_HIGHEST)
    return out.reshape(*p.shape[:-1], -1)


def attend(q: Array, groups: tuple[KeyGroup, ...], sink: Array, segments: Segments, *, scale: float) -> Array:
    """One softmax over all groups and the sink, whose logit only adds to the denominator.

    q (T, H, d), sink (H,) float32. Returns (T, H, d) float32; a token that sees nothing gets 0.
    """
    # All of it by segment: the tokens are regrouped once, and put back in order once.
    q = to_segments(q.astype(jnp.float32), segments)
    valid = to_segments(jnp.concatenate([g.valid for g in groups], axis=-1), segments)[:, :, None]
    scores = jnp.concatenate([_scores(q, g, segments) for g in groups], axis=-1) * scale
    scores = jnp.where(valid, scores, -jnp.inf)
    sink = sink.astype(jnp.float32)[None, None, :, None]
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
    weights = jnp.exp(scores - top)
    denominator = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    out, start = jnp.zeros_like(q), 0
    for group in groups:
        stop = start + group.valid.shape[-1]
        out = out + _weighted(weights[..., start:stop], group, segments)
        start = stop
    return to_tokens(out / denominator, segments)
