"""Writing tokens into the sliding-window ring."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import dispatch
from ..every_layer import attribute, is_static, slots_of
from ..formats.record import Record, encode_record
from ..formats.ue8m0 import scale_bytes
from .ordering import after
from .rows import set_rows


class SWARing(NamedTuple):
    """The window rings of all slots; L layers may be stacked in front of every array, or of none.

    A token at position p lives in row p % W of its slot, so what a row holds follows from the slot's newest position.
    Readers go by that alone; ``pos`` and ``head`` say what was written last, for people and checks.
    """

    nope: Array
    """([L,] R, W, n) uint8 (E4M3 codes), bfloat16 or float32: the part without position."""
    rope: Array
    """([L,] R, W, r) bfloat16, or float32 when ``nope`` is float32."""
    inv_scale: Array | None
    """([L,] R, W) float32 or ([L,] R, W, 8) uint8 (E8M0 per 64 values), the scale of each row; None unless ``nope`` is
    uint8."""
    pos: Array
    """([L,] R, W) int32, the position each row holds, -1 for none."""
    head: Array
    """([L,] R) int32, the row of the slot's next token: (newest position + 1) % W."""


IMPLEMENTATIONS = ("jnp", "cpu", "cuda")


def append_swa(
    ring: SWARing,
    kv: Array,
    slots: Array,
    positions: Array,
    *,
    layer: int | Array | None = None,
    one_token_per_slot: bool = False,
    implementation: str | None = None,
) -> SWARing:
    """Stores T tokens in the ring, quantised as the ring's dtypes say (``quantise_fp8``, ``to_bf16``).

    A token whose slot is outside [0, R) or whose position is negative writes nothing. Of several tokens of one slot,
    those within W of the newest are stored, in whatever order they come; of two with the same position, the later in
    the batch. Every implementation stores the same bits. The update is in place where the ring is donated and nothing
    reads the old ring afterwards. (The sliding window branch of arXiv 2606.19348, section 2.3.3.)

    Args:
      ring: the rings, R slots of W rows.
      kv: (T, n + r) float32 or bfloat16, the part without position first.
      slots: (T,) int32.
      positions: (T,) int32.
      layer: which layer to write, for a stacked ring; an array () int32 must be one of its layers.
      one_token_per_slot: a promise that no slot comes twice, as in a decode step; saves the ordering of tokens.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The ring after the writes.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer or implementation.
    """
    _check(ring, kv, slots, positions, layer, implementation)
    num_slots, num_rows = ring.head.shape[-1], ring.pos.shape[-1]
    roles = resolve_writes(slots, positions, num_slots, num_rows, one_token_per_slot)
    operands = (ring, kv, slots, positions, roles)
    if implementation == "jnp":
        return _append_jnp(*operands, layer=layer, write=_scatter)
    in_native = functools.partial(_append_native, layer=layer)
    if implementation is not None:
        return in_native(*operands)
    in_jnp = functools.partial(_append_jnp, layer=layer, write=set_rows)
    choices = {platform: in_native for platform in dispatch.available() if native_limit(platform, ring) is None}
    return dispatch.on_platform(*operands, default=in_jnp, **choices)


def resolve_writes(
    slots: Array, positions: Array, num_slots: int, num_rows: int, one_token_per_slot: bool = False
) -> Array:
    """Decides which tokens of a batch write: 0 nothing, 1 their row, 2 their row and the slot's head.

    No two tokens with a role share a row and no two with role 2 a slot, so writes need no order.

    Args:
      slots: (T,) int32.
      positions: (T,) int32.
      num_slots: R.
      num_rows: W.
      one_token_per_slot: a promise that no slot comes twice.
    Returns:
      (T,) int32.
    """
    valid = (slots >= 0) & (slots < num_slots) & (positions >= 0)
    if one_token_per_slot:
        return jnp.where(valid, jnp.int32(2), jnp.int32(0))
    token = jnp.arange(slots.shape[0], dtype=jnp.int32)
    slot = jnp.where(valid, slots, num_slots)  # out of range: dropped by the scatters
    newest = jnp.full(num_slots, -1, jnp.int32).at[slot].max(positions, mode="drop")
    newest = newest.at[slot].get(mode="fill", fill_value=-1)
    in_window = valid & (positions > newest - num_rows)
    slot, row = jnp.where(in_window, slots, num_slots), positions % num_rows
    last = jnp.full((num_slots, num_rows), -1, jnp.int32).at[slot, row].max(token, mode="drop")
    writes = in_window & (last.at[slot, row].get(mode="fill", fill_value=-1) == token)
    return jnp.where(writes, jnp.where(positions == newest, jnp.int32(2), jnp.int32(1)), jnp.int32(0))


def _append_jnp(
    ring: SWARing,
    kv: Array,
    slots: Array,
    positions: Array,
    roles: Array,
    *,
    layer: int | Array | None,
    write: Callable[[Array, tuple, Array], Array],
) -> SWARing:
    num_slots, num_rows = ring.nope.shape[-3:-1]
    record = encode_record(kv, Record(ring.nope, ring.rope, ring.inv_scale))
    # Every write comes after what kv was computed from: else XLA copies pos and head where they are read between
    # two layers' writes.
    positions = after(positions, kv[:, 0])
    slot = jnp.where(roles > 0, slots, num_slots)  # out of range: dropped
    head_slot = jnp.where(roles == 2, slots, num_slots)
    row = jnp.where(roles > 0, positions % num_rows, 0)
    stack = () if layer is None else (layer,)
    inv_scale = None
    if ring.inv_scale is not None and record.inv_scale is not None:
        inv_scale = write(ring.inv_scale, (*stack, slot, row), record.inv_scale)
    return SWARing(
        nope=write(ring.nope, (*stack, slot, row), record.nope),
        rope=write(ring.rope, (*stack, slot, row), record.rope),
        inv_scale=inv_scale,
        pos=write(ring.pos, (*stack, slot, row), positions),
        head=write(ring.head, (*stack, head_slot), _next_row(positions, num_rows)),
    )


def _scatter(array: Array, indices: tuple, values: Array) -> Array:
    return array.at[indices].set(values, mode="drop")


def _next_row(positions: Array, num_rows: int) -> Array:
    return (positions % num_rows + 1) % num_rows  # positions + 1 could overflow


def _append_native(
    ring: SWARing, kv: Array, slots: Array, positions: Array, roles: Array, *, layer: int | Array | None
) -> SWARing:
    arrays = jax.tree.leaves(ring)
    results = dispatch.ffi_call(
        "dsv4_append_swa",
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        input_output_aliases={i: i for i in range(len(arrays))},
    )(*arrays, kv, slots_of(slots, layer, ring.head.shape[-1]), positions, roles, layer=attribute(layer))
    return SWARing(*results)


def native_limit(platform: str, ring: SWARing) -> str | None:
    """What keeps the native implementation for "cpu" or "cuda" from serving this ring; None if nothing does."""
    if platform not in dispatch.available():
        return f"the native library for {platform!r} is not installed"
    if ring.nope.dtype != jnp.uint8:
        return f"it stores only FP8 records (nope uint8), not {ring.nope.dtype}"
    widths = (ring.nope.shape[-1], ring.rope.shape[-1])
    if platform == "cuda" and widths != (448, 64):
        return f"it supports only records of 448 + 64 values, not {widths[0]} + {widths[1]}"
    return None


def _check(
    ring: SWARing, kv: Array, slots: Array, positions: Array, layer: int | Array | None, implementation: str | None
) -> None:
    stack_and_ring = ring.nope.shape[:-1]
    if len(stack_and_ring) not in (2, 3):
        raise ValueError(f"append_swa: got ring.nope {ring.nope.shape}; expected ([layers,] slots, rows, width).")
    stacked = len(stack_and_ring) == 3
    formats = {jnp.dtype("uint8"): jnp.bfloat16, jnp.dtype("bfloat16"): jnp.bfloat16, jnp.dtype("float32"): jnp.float32}
    if ring.nope.dtype not in formats:
        raise TypeError(f"append_swa: got ring.nope {ring.nope.dtype}; expected uint8, bfloat16 or float32.")
    has_scale = ring.nope.dtype == jnp.uint8
    if (ring.inv_scale is not None) != has_scale:
        raise ValueError(
            f"append_swa: got ring.inv_scale {'None' if has_scale else 'given'} with ring.nope {ring.nope.dtype}; "
            "expected a scale exactly when ring.nope is uint8."
        )
    width = ring.nope.shape[-1] + ring.rope.shape[-1]
    expected: dict[str, tuple[Array, tuple, tuple]] = {
        "ring.rope": (ring.rope, (*stack_and_ring, ring.rope.shape[-1]), (formats[ring.nope.dtype],)),
        "ring.pos": (ring.pos, stack_and_ring, (jnp.int32,)),
        "ring.head": (ring.head, stack_and_ring[:-1], (jnp.int32,)),
        "kv": (kv, (kv.shape[:1] or (1,)) + (width,), (jnp.float32, jnp.bfloat16)),
        "slots": (slots, kv.shape[:1], (jnp.int32,)),
        "positions": (positions, kv.shape[:1], (jnp.int32,)),
    }
    if ring.inv_scale is not None and ring.inv_scale.dtype == jnp.uint8:
        groups = (scale_bytes(ring.nope.shape[-1]),)
        expected["ring.inv_scale"] = (ring.inv_scale, stack_and_ring + groups, (jnp.uint8,))
    elif ring.inv_scale is not None:
        expected["ring.inv_scale"] = (ring.inv_scale, stack_and_ring, (jnp.float32, jnp.uint8))
    for name, (array, shape, dtypes) in expected.items():
        if array.dtype not in dtypes:
            names = " or ".join(jnp.dtype(d).name for d in dtypes)
            raise TypeError(f"append_swa: got {name} {array.dtype}; expected {names}.")
        if array.shape != shape:
            raise ValueError(f"append_swa: got {name} {array.shape}; expected {shape}.")
    if stacked and layer is None:
        raise ValueError(f"append_swa: the ring is stacked over {stack_and_ring[0]} layers; give layer.")
    if not stacked and layer is not None:
        raise ValueError(f"append_swa: got layer {layer} with a ring that is not stacked over layers; leave it out.")
    if layer is not None and is_static(layer) and not 0 <= layer < stack_and_ring[0]:
        raise ValueError(f"append_swa: got layer {layer}; expected 0 to {stack_and_ring[0] - 1}.")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"append_swa: got implementation {implementation!r}; expected None, 'jnp', 'cpu' or 'cuda'.")
    if implementation in ("cpu", "cuda") and (limit := native_limit(implementation, ring)):
        raise ValueError(f"append_swa: implementation {implementation!r} cannot be used: {limit}; leave it to None.")
