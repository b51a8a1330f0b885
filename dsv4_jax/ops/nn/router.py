"""Which experts a token takes, and by how much (arXiv 2606.19348, section 2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch

Array = jax.Array

MOST_EXPERTS, MOST_PICKS = 1024, 32
"""What the CUDA form takes."""


class ByScore(NamedTuple):
    """The best scores, with a bias that counts for the choice alone."""

    bias: Array  # (E,) float32


class ByToken(NamedTuple):
    """A table from token ids."""

    table: Array  # (vocabulary, k) int32
    token_ids: Array  # (T,) int32


def choose_experts(
    logits: Array, rule: ByScore | ByToken, *, k: int, scaling: float, implementation: str | None = None
) -> tuple[Array, Array]:
    """The experts of each token, and their weights: scores sqrt(softplus(logits)), made to sum to `scaling`.

    Equal scores go to the lower index; a NaN is the best score.

    Args:
      logits: (T, E) float32.
      rule: how experts are chosen.
      k: how many.
      scaling: sum of a token's weights.
      implementation: "jnp" or "cuda"; None takes the native one where it serves.

    Returns:
      Experts (T, k) int32, the best first or in the order of the table, and weights (T, k) float32.

    Raises:
      ValueError: an implementation that cannot be used.
    """

    def in_jnp(logits: Array, rule: ByScore | ByToken) -> tuple[Array, Array]:
        scores = jnp.sqrt(jax.nn.softplus(logits))
        if isinstance(rule, ByToken):
            picks = rule.table[rule.token_ids]
        else:
            _, picks = jax.lax.top_k(scores + rule.bias[None], k)
        weights = jnp.take_along_axis(scores, picks, axis=-1)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20) * scaling
        return picks.astype(jnp.int32), weights

    def in_native(logits: Array, rule: ByScore | ByToken) -> tuple[Array, Array]:
        shape = (logits.shape[0], k)
        results = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
        picks, weights = dispatch.ffi_call("dsv4_route", results)(
            logits, *rule, k=np.int64(k), scaling=np.float32(scaling)
        )
        return picks, weights

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if logits.shape[1] > MOST_EXPERTS or k > MOST_PICKS:
            return f"it takes up to {MOST_EXPERTS} experts and {MOST_PICKS} picks, not {logits.shape[1]} and {k}"
        return None

    return dispatch.call("choose_experts", implementation, limit, in_native, in_jnp, logits, rule)
