"""Reading the window ring: where a position lies, and the rows a segment may need."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .. import dispatch
from ..every_layer import attribute, slots_of
from ..formats.record import Record, decode_record, native_read_limit
from ..write.append_swa import SWARing

Array = jax.Array


def ring_positions(newest: Array, num_rows: int) -> Array:
    """Position each ring row holds once positions 0 … newest are written: newest (S,) int32 -> (S, W); negative: none.

    The row of a position is position mod W, so what a row holds follows from the newest position alone.
    """
    rows = jnp.arange(num_rows, dtype=jnp.int32)[None]
    newest = newest[:, None]
    return newest - (newest - rows) % num_rows


def read_window(
    ring: SWARing | Record,
    slots: Array,
    newest: Array,
    *,
    layer: int | Array,
    window: int,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """The last `window` tokens up to `newest` of each slot, in ring order.

    ring: arrays (L, R, W, ...); layer: an int, or an array () int32 that is one of L.
    slots (S,) int32 (-1: nothing), newest (S,) int32 (-1: nothing written yet). Returns
    kv (S, W, d) of `dtype`, zero where a row is not part of the window, and positions (S, W) int32, -1 there.
    `implementation`: "jnp", "cpu" or "cuda", which return the same bits; None takes the native one where there is one.
    It does not read rows outside the window. ValueError for an implementation that cannot be used.
    """
    record = Record(ring.nope, ring.rope, ring.inv_scale)
    positions = ring_positions(newest, ring.nope.shape[2])
    inside = (positions >= 0) & (positions > (newest - window)[:, None])
    inside &= ((slots >= 0) & (slots < ring.nope.shape[1]))[:, None]

    def in_jnp(record: Record, slots: Array, newest: Array, inside: Array) -> Array:
        rows = jax.tree.map(lambda x: x.at[layer, jnp.maximum(slots, 0)].get(mode="clip"), record)
        return jnp.where(inside[..., None], decode_record(rows, dtype), jnp.zeros((), dtype))

    def in_native(record: Record, slots: Array, newest: Array, inside: Array) -> Array:
        width = record.nope.shape[-1] + record.rope.shape[-1]
        result = jax.ShapeDtypeStruct((*inside.shape, width), dtype)
        call = dispatch.ffi_call("dsv4_read_window", result)
        slots = slots_of(slots, layer, record.nope.shape[1])
        return call(*record, slots, newest, layer=attribute(layer), window=np.int64(window))

    kv = dispatch.call(
        "read_window",
        implementation,
        lambda platform: native_read_limit(platform, record, dtype),
        in_native,
        in_jnp,
        record,
        slots,
        newest,
        inside,
    )
    return kv, jnp.where(inside, positions, -1)
