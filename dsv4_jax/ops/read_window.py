"""Reading the window ring: where a position lies, and the rows a segment may need."""

import jax
import jax.numpy as jnp

from .append_swa import SWARing
from .record import Record, decode_record

Array = jax.Array


def ring_positions(newest: Array, num_rows: int) -> Array:
    """Position each ring row holds once positions 0 … newest are written: newest (S,) int32 -> (S, W); negative: none.

    The row of a position is position mod W, so what a row holds follows from the newest position alone.
    """
    rows = jnp.arange(num_rows, dtype=jnp.int32)[None]
    newest = newest[:, None]
    return newest - (newest - rows) % num_rows


def read_window(
    ring: SWARing, slots: Array, newest: Array, *, layer: int, window: int, dtype: jnp.dtype = jnp.float32
) -> tuple[Array, Array]:
    """The last `window` tokens up to `newest` of each slot, in ring order.

    ring: arrays (L, R, W, ...). slots (S,) int32 (-1: nothing), newest (S,) int32 (-1: nothing written yet). Returns
    kv (S, W, d) of `dtype`, zero where a row is not part of the window, and positions (S, W) int32, -1 there.
    """
    positions = ring_positions(newest, ring.pos.shape[2])
    inside = (positions >= 0) & (positions > (newest - window)[:, None]) & (slots >= 0)[:, None]
    record = Record(ring.nope, ring.rope, ring.inv_scale)
    rows = jax.tree.map(lambda x: x.at[layer, jnp.maximum(slots, 0)].get(mode="clip"), record)
    kv = jnp.where(inside[..., None], decode_record(rows, dtype), jnp.zeros((), dtype))
    return kv, jnp.where(inside, positions, -1)
