"""Which experts a token takes, and by how much (arXiv 2606.19348, section 2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch

Array = jax.Array

MOST_EXPERTS, MOST_PICKS = 1024, 32
"""What the CUDA form takes."""

MOST_TOKENS = 32
"""Tokens of which the CUDA form computes logits, too."""


class ByScore(NamedTuple):
    """The best scores, with a bias that counts for the choice alone."""

    bias: Array  # (E,) float32


class ByToken(NamedTuple):
    """A table from token ids."""

    table: Array  # (vocabulary, k) int32
    token_ids: Array  # (T,) int32


def choose_experts(
    logits: Array,
    rule: ByScore | ByToken,
    *,
    k: int,
    scaling: float,
    slots: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The experts of each token, and their weights: scores sqrt(softplus(logits)), made to sum to `scaling`.

    Equal scores go to the lower index; a NaN is the best score.

    Args:
      logits: (T, E) float32.
      rule: how experts are chosen.
      k: how many.
      scaling: sum of a token's weights.
      slots: (T,) int32 of the step: a token of a slot below 0 is padding and takes no expert, so that none is read for
        it. None: every token counts.
      implementation: "jnp" or "cuda"; None takes the native one where it serves.

    Returns:
      Experts (T, k) int32, the best first or in the order of the table, -1 for padding, and weights (T, k) float32.

    Raises:
      ValueError: an implementation that cannot be used.
    """

    def in_jnp(logits: Array, rule: ByScore | ByToken, slots: Array | None) -> tuple[Array, Array]:
        scores = jnp.sqrt(jax.nn.softplus(logits))
        if isinstance(rule, ByToken):
            picks = rule.table[rule.token_ids]
        else:
            _, picks = jax.lax.top_k(scores + rule.bias[None], k)
        weights = jnp.take_along_axis(scores, picks, axis=-1)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20) * scaling
        picks = picks.astype(jnp.int32)
        if slots is None:
            return picks, weights
        here = slots[:, None] >= 0
        return jnp.where(here, picks, -1), jnp.where(here, weights, 0.0)

    def in_native(logits: Array, rule: ByScore | ByToken, slots: Array | None) -> tuple[Array, Array]:
        shape = (logits.shape[0], k)
        results = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
        operands = (logits, *rule) if slots is None else (logits, *rule, slots)
        picks, weights = dispatch.ffi_call("dsv4_route", results)(
            *operands, k=np.int64(k), scaling=np.float32(scaling), has_slots=np.int64(slots is not None),
            from_x=np.int64(0),
        )  # fmt: skip
        return picks, weights

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if not logits.shape[0]:
            return "it takes a token or more"
        if logits.shape[1] > MOST_EXPERTS or k > MOST_PICKS:
            return f"it takes up to {MOST_EXPERTS} experts and {MOST_PICKS} picks, not {logits.shape[1]} and {k}"
        return None

    return dispatch.call("choose_experts", implementation, limit, in_native, in_jnp, logits, rule, slots)


def route(
    x: Array,
    weight: Array,
    rule: ByScore | ByToken,
    *,
    k: int,
    scaling: float,
    slots: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`choose_experts` of logits x W^T, which are exact products summed in float32; of few tokens in one launch.

    Args:
      x: (T, K) bfloat16 or float32.
      weight: (E, K), of x's dtype.
      rule, k, scaling, slots, implementation: as in `choose_experts`.

    Returns:
      As `choose_experts`.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot be used.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"route: x is {x.dtype} {x.shape} and the weight {weight.dtype} {weight.shape}, expected one dtype, (T, K) "
            "and (E, K)"
        )
    tokens, experts = x.shape[0], weight.shape[0]

    def one_by_one(x: Array, weight: Array, rule: ByScore | ByToken, slots: Array | None) -> tuple[Array, Array]:
        precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        logits = jnp.einsum("th,eh->te", x, weight, precision=precision, preferred_element_type=jnp.float32)
        inner = implementation if implementation == "jnp" else None
        return choose_experts(logits, rule, k=k, scaling=scaling, slots=slots, implementation=inner)

    def in_native(x: Array, weight: Array, rule: ByScore | ByToken, slots: Array | None) -> tuple[Array, Array]:
        results = jax.ShapeDtypeStruct((tokens, k), jnp.int32), jax.ShapeDtypeStruct((tokens, k), jnp.float32)
        picks, weights = dispatch.ffi_call("dsv4_route", results)(
            *jax.tree.leaves((x, weight, rule, slots)), k=np.int64(k), scaling=np.float32(scaling),
            has_slots=np.int64(slots is not None), from_x=np.int64(1),
        )  # fmt: skip
        return picks, weights

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16 or not 0 < tokens <= MOST_TOKENS or x.shape[1] % 256 or k > min(MOST_PICKS, experts):
            return f"it takes 1 to {MOST_TOKENS} tokens of bfloat16, multiples of 256 columns, {MOST_PICKS} picks"
        if not 128 <= experts <= 512 or experts % (32 if experts > 256 else 16):
            return f"it takes 128 to 512 experts, multiples of 16 and above 256 of 32, not {experts}"
        return None

    return dispatch.call("route", implementation, limit, in_native, one_by_one, x, weight, rule, slots)
