"""Writing raw projections into the sliding-window ring: RMSNorm, RoPE, quantisation and the write in one operation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import dispatch
from ..every_layer import attribute, slots_of
from ..nn.rms_norm import rms_norm
from ..nn.rope import apply_rope
from .append_swa import SWARing, append_swa, native_limit, resolve_writes


def append_swa_fused(
    ring: SWARing,
    kv: Array,
    norm: Array,
    cos: Array,
    sin: Array,
    slots: Array,
    positions: Array,
    *,
    eps: float,
    layer: int | Array | None = None,
    one_token_per_slot: bool = False,
    implementation: str | None = None,
) -> SWARing:
    """``append_swa`` of ``apply_rope(rms_norm(kv, norm, eps=eps), cos, sin)``, computed in float32 throughout.

    The native implementations store the same bits as each other; the jax.numpy form may round the norm otherwise in the
    last bit. (The sliding window branch of arXiv 2606.19348, section 2.3.3.)

    Args:
      ring: the rings, R slots of W rows.
      kv: (T, n + r) float32 or bfloat16, the raw output of the wkv projection, the part without position first.
      norm: (n + r,) float32, the RMSNorm weight.
      cos: (T, r / 2) float32, of each token's position.
      sin: (T, r / 2) float32.
      slots: (T,) int32.
      positions: (T,) int32.
      eps: of the RMSNorm.
      layer: which layer to write, for a stacked ring; an array () int32 must be one of its layers.
      one_token_per_slot: a promise that no slot comes twice, as in a decode step; saves the ordering of tokens.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The ring after the writes.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer or implementation.
    """
    _check(ring, kv, norm, cos, sin)
    options: dict[str, Any] = {"layer": layer, "one_token_per_slot": one_token_per_slot}

    def in_jnp(ring, kv, norm, cos, sin, slots, positions, form=None):
        values = apply_rope(rms_norm(kv.astype(jnp.float32), norm, eps=eps), cos, sin)
        return append_swa(ring, values, slots, positions, implementation=form, **options)

    operands = (ring, kv, norm, cos, sin, slots, positions)
    # What append_swa checks, it checks here too.
    jax.eval_shape(functools.partial(in_jnp, form=implementation), *operands)
    if implementation == "jnp":
        return in_jnp(*operands, form="jnp")
    in_native: Callable[..., SWARing] = functools.partial(_in_native, eps=eps, **options)
    if implementation is not None:
        return in_native(*operands)
    choices = {platform: in_native for platform in dispatch.available() if native_limit(platform, ring) is None}
    return dispatch.on_platform(*operands, default=in_jnp, **choices)


def _in_native(
    ring: SWARing,
    kv: Array,
    norm: Array,
    cos: Array,
    sin: Array,
    slots: Array,
    positions: Array,
    *,
    eps: float,
    layer: int | Array | None,
    one_token_per_slot: bool,
) -> SWARing:
    inputs = fused_operands(ring, kv, norm, cos, sin, slots, positions, layer, one_token_per_slot=one_token_per_slot)
    arrays = jax.tree.leaves(ring)
    results = dispatch.ffi_call(
        "dsv4_append_swa_fused",
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        input_output_aliases={i: i for i in range(len(arrays))},
    )(*arrays, *inputs, layer=attribute(layer), eps=np.float32(eps))
    return SWARing(*results)


def fused_operands(
    ring: SWARing,
    kv: Array,
    norm: Array,
    cos: Array,
    sin: Array,
    slots: Array,
    positions: Array,
    layer: int | Array | None,
    *,
    one_token_per_slot: bool,
) -> list[Array]:
    """The native operation's operands after the ring's arrays."""
    roles = resolve_writes(slots, positions, ring.head.shape[-1], ring.pos.shape[-1], one_token_per_slot)
    return [kv, slots_of(slots, layer, ring.head.shape[-1]), positions, roles, norm, cos, sin]


def _check(ring: SWARing, kv: Array, norm: Array, cos: Array, sin: Array) -> None:
    if kv.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"append_swa_fused: got kv {kv.dtype}; expected float32 or bfloat16.")
    pairs = (*kv.shape[:1], ring.rope.shape[-1] // 2)
    expected = {"norm": (norm, kv.shape[1:]), "cos": (cos, pairs), "sin": (sin, pairs)}
    for name, (array, shape) in expected.items():
        if array.dtype != jnp.float32:
            raise TypeError(f"append_swa_fused: got {name} {array.dtype}; expected float32.")
        if array.shape != shape:
            raise ValueError(f"append_swa_fused: got {name} {array.shape}; expected {shape}.")
