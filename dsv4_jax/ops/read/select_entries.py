"""The CSA indexer: scores of the visible entries, and the best k of them (arXiv 2606.19348, section 2.3)."""

import jax
import jax.numpy as jnp

from ..segments import Segments, to_segments, to_tokens

Array = jax.Array


def index_scores(q: Array, weights: Array, keys: Array, valid: Array, segments: Segments) -> Array:
    """Scores (T, E) float32: sum over heads of weight * relu(q . key) / sqrt(d); -inf where not valid.

    q (T, heads, d), weights (T, heads), keys (S, E, d) of the token's segment, valid (T, E) bool.
    """
    q, w = to_segments(q.astype(jnp.float32), segments), to_segments(weights.astype(jnp.float32), segments)
    logits = jnp.einsum("schd,sed->sche", q, keys.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jnp.einsum("sch,sche->sce", w, jax.nn.relu(logits), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(valid, to_tokens(scores, segments) * q.shape[-1] ** -0.5, -jnp.inf)


def select_top_k(scores: Array, visible: Array, k: int) -> Array:
    """Indices (T, k) int32 of the k best scores (T, E), equal scores by lower index, -1 where fewer are visible.

    visible (T,) int32: entries below it can be seen, the others score -inf.
    """
    # To top_k, 0 is more than -0, which is what a negative weight makes of a relu's zero.
    _, index = jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k)
    return jnp.where(index < visible[:, None], index.astype(jnp.int32), -1)
