"""A layer whose index is known on the device alone, as in `lax.scan` over layers, for operations on stacks of layers.

An index that is an array is no attribute of a native call. There slots and blocks are counted through all layers
instead: slot s of R in layer l is slot l * R + s, block b of N is block l * N + b. The arrays stay as they are, and
writes in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .segments import Segments

Array = jax.Array

EVERY_LAYER = -2
"""What native code is told as the layer (`kEveryLayer` in ffi/common/operands.h)."""


def is_static(layer: Any) -> bool:
    """Whether a layer's index is a number of Python, or None for arrays of one layer."""
    return layer is None or isinstance(layer, int | np.integer)


def attribute(layer: Any) -> np.int64:
    """A layer as an attribute of a native call: -1 for None, `EVERY_LAYER` for an array."""
    return np.int64((-1 if layer is None else layer) if is_static(layer) else EVERY_LAYER)


def slots_of(slots: Array, layer: Any, num_slots: int) -> Array:
    """Slots (n,) int32 as a native call with `attribute(layer)` takes them; those out of range are -1."""
    if is_static(layer):
        return slots
    return jnp.where((slots >= 0) & (slots < num_slots), layer * num_slots + slots, -1)


def segments_of(segments: Segments, layer: Any, num_slots: int) -> Segments:
    """As `slots_of`, of a step's segments."""
    return segments._replace(slots=slots_of(segments.slots, layer, num_slots))


def table_of(table: Array, layer: Any, num_layers: int, num_blocks: int) -> Array:
    """As `slots_of`, a table (R, B) int32: (L * R, B) for an array, whatever it holds, so that a loop makes it once."""
    if is_static(layer):
        return table
    first = jnp.arange(num_layers, dtype=jnp.int32)[:, None, None] * num_blocks
    return jnp.where(table >= 0, table[None] + first, -1).reshape(num_layers * table.shape[0], table.shape[1])
