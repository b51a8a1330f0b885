"""Writing raw projections into the sliding-window ring: RMSNorm, RoPE, quantisation and the write in one operation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import dispatch
from ..every_layer import attribute, slots_of
from ..nn.rms_norm import rms_norm
from ..nn.rope import apply_rope
from ..segments import StepTokens
from .append_swa import SWARing, append_swa, native_limit, resolve_writes


class RawWindow(NamedTuple):
    """What ``append_swa_fused`` takes of T tokens."""

    kv: Array  # (T, n + r) float32 | bfloat16, raw output of the wkv projection
    norm: Array  # (n + r,) float32, the RMSNorm weight
    cos: Array  # (T, r / 2) float32, of each token's position
    sin: Array  # (T, r / 2) float32


def append_swa_fused(
    ring: SWARing,
    window: RawWindow,
    tokens: StepTokens,
    *,
    eps: float,
    layer: int | Array | None = None,
    implementation: str | None = None,
) -> SWARing:
    """``append_swa`` of ``apply_rope(rms_norm(kv, norm, eps=eps), cos, sin)``, computed in float32 throughout.

    The native implementations store the same bits as each other; the jax.numpy form may round the norm otherwise in the
    last bit. (The sliding window branch of arXiv 2606.19348, section 2.3.3.)

    Args:
      ring: the rings, R slots of W rows.
      window: raw output of the wkv projection, the part without position first, and what norms and rotates it.
      tokens: slots and positions; segments of one token each promise that no slot comes twice, which saves the ordering
        of tokens.
      eps: of the RMSNorm.
      layer: which layer to write, for a stacked ring; an array () int32 must be one of its layers.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one.
    Returns:
      The ring after the writes.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer or implementation.
    """
    _check(ring, window)

    def in_jnp(ring: SWARing, window: RawWindow, tokens: StepTokens, form: str | None = None) -> SWARing:
        kv, norm, cos, sin = window
        values = apply_rope(rms_norm(kv.astype(jnp.float32), norm, eps=eps), cos, sin)
        return append_swa(
            ring, values, tokens.slots, tokens.positions, layer=layer, one_token_per_slot=tokens.one_per_slot,
            implementation=form,
        )  # fmt: skip

    # What append_swa checks, it checks here too.
    jax.eval_shape(functools.partial(in_jnp, form=implementation), ring, window, tokens)
    if implementation == "jnp":
        return in_jnp(ring, window, tokens, form="jnp")
    in_native: Callable[..., SWARing] = functools.partial(_in_native, eps=eps, layer=layer)
    if implementation is not None:
        return in_native(ring, window, tokens)
    choices = {platform: in_native for platform in dispatch.available() if native_limit(platform, ring) is None}
    return dispatch.on_platform(ring, window, tokens, default=in_jnp, **choices)


def _in_native(
    ring: SWARing, window: RawWindow, tokens: StepTokens, *, eps: float, layer: int | Array | None
) -> SWARing:
    arrays = jax.tree.leaves(ring)
    results = dispatch.ffi_call(
        "dsv4_append_swa_fused",
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        input_output_aliases={i: i for i in range(len(arrays))},
    )(*arrays, *fused_operands(ring, window, tokens, layer), layer=attribute(layer), eps=np.float32(eps))
    return SWARing(*results)


def fused_operands(ring: SWARing, window: RawWindow, tokens: StepTokens, layer: int | Array | None) -> list[Array]:
    """The native operation's operands after the ring's arrays."""
    (num_slots, num_rows), (slots, positions) = (ring.head.shape[-1], ring.pos.shape[-1]), tokens[:2]
    roles = resolve_writes(slots, positions, num_slots, num_rows, tokens.one_per_slot)
    return [window.kv, slots_of(slots, layer, num_slots), positions, roles, window.norm, window.cos, window.sin]


def _check(ring: SWARing, window: RawWindow) -> None:
    kv, norm, cos, sin = window
    if kv.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"append_swa_fused: got kv {kv.dtype}; expected float32 or bfloat16.")
    pairs = (*kv.shape[:1], ring.rope.shape[-1] // 2)
    expected = {"norm": (norm, kv.shape[1:]), "cos": (cos, pairs), "sin": (sin, pairs)}
    for name, (array, shape) in expected.items():
        if array.dtype != jnp.float32:
            raise TypeError(f"append_swa_fused: got {name} {array.dtype}; expected float32.")
        if array.shape != shape:
            raise ValueError(f"append_swa_fused: got {name} {array.shape}; expected {shape}.")
