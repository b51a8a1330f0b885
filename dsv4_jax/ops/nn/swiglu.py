"""The gated activation between the products of an expert (arXiv 2606.19348, section 2.1)."""

import jax
import jax.numpy as jnp

Array = jax.Array


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(gate) * up, the gate cut off above `limit`, the up projection on both sides; in float32, of gate's dtype."""
    wide = jnp.minimum(gate.astype(jnp.float32), limit), jnp.clip(up.astype(jnp.float32), -limit, limit)
    return (jax.nn.silu(wide[0]) * wide[1]).astype(gate.dtype)
