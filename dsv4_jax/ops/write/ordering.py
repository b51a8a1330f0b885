"""Order between a read of the old cache and the write that overwrites it."""

import jax
import jax.numpy as jnp

Array = jax.Array


def after(index: Array, *values: Array) -> Array:
    """`index` (int32) unchanged, but computed only once `values` are.

    XLA updates a donated buffer in place only when every read of its old content is forced to come first; an
    optimization barrier does not force it, a data dependency does. So a write that must follow a read takes an operand
    that depends on what was read. The term added here is 0 for every value (nothing is NaN and equal to itself), which
    no simplification of XLA sees.
    """
    for value in values:
        total = jnp.sum(value.astype(jnp.float32))
        index = index + (jnp.isnan(total) & (total == total)).astype(index.dtype)
    return index
