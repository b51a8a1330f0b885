"""Experts spread over the devices of a mesh: tokens go to every device, and what its experts add comes back.

Each device sends its tokens with their picks to all others (one all_gather), computes what its own experts add to
anybody's tokens, and sends each device the part of its tokens (one all_to_all, as many bytes as a reduce-scatter). The
parts are summed in float32 in the order of the devices, so that a token's bits do not depend on which device it is on.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

_WORDS = {2: jnp.uint16, 4: jnp.uint32}


def exchange(
    experts: Callable[[Array, Array, Array], Array],
    x: Array,
    picks: Array,
    weights: Array,
    *,
    axes: Sequence[str],
    num_here: int,
) -> Array:
    """What all experts add to a device's tokens; inside `jax.shard_map`.

    A token's result differs from that of one device with all experts by the rounding of a sum in another order, and
    where x is bfloat16 by one rounding to bfloat16 for each device that has one of its experts.

    Args:
      experts: (x, picks, weights) of any tokens -> what this device's experts add; picks count from its first expert,
        one outside 0 … num_here - 1 adds nothing.
      x: (T, hidden) bfloat16 or float32, tokens of this device; the same along axes after the first.
      picks: (T, k) int32, of all experts.
      weights: (T, k) float32.
      axes: mesh axes over which the experts are spread in order; tokens are spread over the first.
      num_here: experts on this device.

    Returns:
      (T, hidden) float32: what the experts of the devices along the first axis add, to be summed along the others.
    """
    data = axes[0]
    tokens, hidden = x.shape
    k = picks.shape[1]
    word = _WORDS[x.dtype.itemsize]

    def words(values: Array) -> Array:
        return jax.lax.bitcast_convert_type(values, word).reshape(tokens, -1)

    # One call for all three, as integers, which no device rounds or quietens on the way.
    sent = jnp.concatenate([words(x), words(picks), words(weights)], axis=1)
    every = jax.lax.all_gather(sent, data, tiled=True)
    width = (every.shape[1] - hidden) // 2

    def values(part: Array, dtype: jnp.dtype) -> Array:
        return jax.lax.bitcast_convert_type(part if part.shape[1] == k else part.reshape(len(part), k, -1), dtype)

    first = num_here * jax.lax.axis_index(tuple(axes))
    added = experts(
        jax.lax.bitcast_convert_type(every[:, :hidden], x.dtype),
        values(every[:, hidden : hidden + width], jnp.dtype(jnp.int32)) - first.astype(jnp.int32),
        values(every[:, hidden + width :], jnp.dtype(jnp.float32)),
    )
    parts = jax.lax.all_to_all(added, data, 0, 0, tiled=True).reshape(-1, tokens, hidden)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total
