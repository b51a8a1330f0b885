"""Experts spread over the devices of a mesh: tokens go to every device, and what its experts add comes back.

Every device gets all tokens (one all_gather), picks experts for them, computes what its own experts add, and gets from
each device what that adds to its own tokens (one collective more). The parts are summed in float32 in the order of the
devices, so that a token's bits do not depend on which device it is on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

FEW_BYTES = 2**20
"""Up to so many to a device every device gets all that is added, which is faster than a part of it for each."""


def exchange(add: Callable[..., Array], x: Array, *of_tokens: Array | None, axis: str) -> Array:
    """What all experts add to a device's tokens; inside `jax.shard_map`.

    A token's result differs from that of one device with all experts by the rounding of a sum in another order, and
    where x is bfloat16 by one rounding to bfloat16 for each device that has one of its experts.

    Args:
      add: (x, *of_tokens) of any tokens -> what this device's experts add, as x.
      x: (T, hidden) bfloat16 or float32, tokens of this device.
      of_tokens: (T, ...) what else `add` is given.
      axis: the mesh axis over which tokens are spread.

    Returns:
      (T, hidden) float32: what the experts of the devices along the axis add.
    """
    tokens = x.shape[0]
    every = (part if part is None else jax.lax.all_gather(part, axis, tiled=True) for part in (x, *of_tokens))
    added = add(*every)
    devices = added.shape[0] // max(tokens, 1)
    if devices * added.nbytes <= FEW_BYTES:
        all_parts = jax.lax.all_gather(added, axis)
        parts = jax.lax.dynamic_slice_in_dim(all_parts, jax.lax.axis_index(axis) * tokens, tokens, axis=1)
    else:
        parts = jax.lax.all_to_all(added, axis, 0, 0, tiled=True).reshape(-1, *x.shape)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total
