"""Products of one input with several bfloat16 weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import dispatch

Array = jax.Array

MOST_TOKENS, MOST_WEIGHTS = 64, 8
"""What the CUDA form takes at once."""


def multiply_each(x: Array, weights: Sequence[Array], *, implementation: str | None = None) -> tuple[Array, ...]:
    """y = x W^T with each of several weights, summed in float32; on a GPU in one launch, and no weight is copied.

    XLA:GPU puts such weights together in every step, to multiply once.

    Args:
      x: (T, K) bfloat16.
      weights: (N, K) bfloat16 each.
      implementation: "jnp" or "cuda"; None takes the native one where it serves.

    Returns:
      (T, N) bfloat16 for each weight.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot be used.
    """
    for array in (x, *weights):
        if array.ndim != 2 or array.shape[1] != x.shape[-1] or array.dtype != jnp.bfloat16:
            raise ValueError(
                f"multiply_each: x is {x.dtype} {x.shape} and a weight {array.dtype} {array.shape}, expected bfloat16 "
                "(T, K) and (N, K)"
            )

    def in_jnp(x: Array, *weights: Array) -> tuple[Array, ...]:
        return tuple(jnp.einsum("tk,nk->tn", x, weight) for weight in weights)

    def in_native(x: Array, *weights: Array) -> tuple[Array, ...]:
        results = tuple(jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype) for weight in weights)
        call: Any = dispatch.ffi_call("dsv4_dense", results)
        return tuple(call(x, *weights))

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if not 0 < x.shape[0] <= MOST_TOKENS or not 0 < len(weights) <= MOST_WEIGHTS:
            return (
                f"it takes 1 to {MOST_TOKENS} tokens and 1 to {MOST_WEIGHTS} weights, not {x.shape[0]} and "
                f"{len(weights)}"
            )
        if x.shape[1] % 256 or any(weight.shape[0] % 32 for weight in weights):
            return "it takes multiples of 256 columns and of 32 rows"
        return None

    return dispatch.call("multiply_each", implementation, limit, in_native, in_jnp, x, *weights)
