"""The routed experts of a layer with weights in the released FP4 form (arXiv 2606.19348, section 2.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..formats.fp4 import dequantise_fp4

Array = jax.Array

GROUP = 32
"""Values of a row that share a scale."""


class Fp4Weight(NamedTuple):
    """A matrix for each of E experts, as the release stores it: E2M1 codes with a power-of-two scale per 32 of a row.

    Attributes:
      codes: (E, N, K / 2) uint8, two values a byte, the even column in the low four bits.
      scale: (E, N, K / 32) uint8, the bits of E8M0 values: 2^(scale - 127).
    """

    codes: Array
    scale: Array


class ExpertWeights(NamedTuple):
    """The routed experts: w2(silu(min(w1 x, limit)) * clip(w3 x, -limit, limit)).

    Attributes:
      w1, w3: gate and up, (E, inner, hidden).
      w2: down, (E, hidden, inner).
    """

    w1: Fp4Weight
    w2: Fp4Weight
    w3: Fp4Weight


def apply_experts(
    x: Array, picks: Array, weights: Array, experts: ExpertWeights, *, limit: float, implementation: str | None = None
) -> Array:
    """The weighted sum of a token's experts, with their weights kept as released.

    Each product is summed in float32 or better, and a token's experts in the order of its picks: its bits depend on
    shapes and on that token alone. From the same stored weights a result is within 2e-3 (relative, L2) of the exact one
    for bfloat16 x, which is nearly all its own rounding, and within 1e-5 for float32. An expert that nobody picked is
    not read.

    Args:
      x: (T, hidden) bfloat16 or float32.
      picks: (T, k) int32, the experts of a token; one outside 0 … E - 1 adds nothing.
      weights: (T, k) float32, by which its experts' outputs are multiplied.
      experts: `ExpertWeights` of E experts.
      limit: of SwiGLU: the gate is cut off above it, the up projection on both sides.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one that serves.

    Returns:
      (T, hidden), of x's dtype.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot be used.
    """
    _check(x, picks, weights, experts)

    def in_jnp(x: Array, picks: Array, weights: Array, experts: ExpertWeights) -> Array:
        return _in_jnp(x, picks, weights, experts, limit)

    def in_native(x: Array, picks: Array, weights: Array, experts: ExpertWeights) -> Array:
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)

        def on_cpu(*operands: Array) -> Array:
            return dispatch.ffi_call("dsv4_experts", result)(*operands, limit=np.float32(limit))

        def on_cuda(*operands: Array) -> Array:
            scratch = jax.ShapeDtypeStruct(
                (
                    _scratch_bytes(
                        picks.shape[0], picks.shape[1], experts.w1.codes.shape[0], experts.w1.codes.shape[1], x.shape[1]
                    ),
                ),
                jnp.uint8,
            )
            return dispatch.ffi_call("dsv4_experts", (result, scratch))(*operands, limit=np.float32(limit))[0]

        operands = (x, picks, weights, *experts.w1, *experts.w2, *experts.w3)
        return dispatch.on_platform(*operands, default=on_cpu, cuda=on_cuda)

    def cannot(platform: str) -> str | None:
        if platform == "cpu":
            return None
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {x.dtype}"
        if not picks.size or not experts.w1.codes.shape[0]:
            return "it takes a token, a pick and an expert or more"
        inner, hidden = experts.w1.codes.shape[1], x.shape[1]
        if hidden % 512 or inner % 512 or not 0 < limit <= 64:
            return f"it takes sizes that are multiples of 512 and a limit up to 64, not {hidden}, {inner} and {limit}"
        return None

    return dispatch.call("apply_experts", implementation, cannot, in_native, in_jnp, x, picks, weights, experts)


def _in_jnp(x: Array, picks: Array, weights: Array, experts: ExpertWeights, limit: float) -> Array:
    def product(x: Array, weight: Fp4Weight) -> Array:
        values = dequantise_fp4(*weight, "mxfp4")
        return jnp.einsum("...k,nk->...n", x, values, precision=jax.lax.Precision.HIGHEST)

    def expert(x: Array, e: Array) -> Array:
        one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False), experts)
        gate, up = product(x, one.w1), product(x, one.w3)
        return product(jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit), one.w2)

    number, wide = experts.w1.codes.shape[0], x.astype(jnp.float32)
    if not picks.size or not number:
        return jnp.zeros_like(x)
    valid = (picks >= 0) & (picks < number)
    if picks.size <= number:
        # A pick at a time: what is read is what was picked.
        flat = jnp.where(valid, picks, 0).reshape(-1)
        each = jax.lax.map(lambda row: expert(wide[row // picks.shape[1]], flat[row]), jnp.arange(picks.size))
        each = each.reshape(*picks.shape, -1)
    else:
        # An expert at a time, for all tokens.
        def step(each: Array, e: Array) -> tuple[Array, None]:
            mine = picks == e

            def run(each: Array) -> Array:
                return jnp.where(mine[..., None], expert(wide, e)[:, None], each)

            return jax.lax.cond(jnp.any(mine), run, lambda each: each, each), None

        each = jnp.zeros((*picks.shape, x.shape[1]), jnp.float32)
        each, _ = jax.lax.scan(step, each, jnp.arange(number, dtype=picks.dtype))
    total = jnp.zeros(x.shape, jnp.float32)
    for pick in range(picks.shape[1]):
        total = total + jnp.where(valid[:, pick, None], each[:, pick] * weights[:, pick, None], 0.0)
    return total.astype(x.dtype)


def _scratch_bytes(tokens: int, k: int, number: int, inner: int, hidden: int) -> int:
    """What the CUDA form needs: who picked which expert, activations between its products, and their results."""
    entries = tokens * k
    few = (4, 4 * number, 4 * number + 4, 4 * entries, 4 + 8 * (number + entries), 2 * entries * inner,
           4 * entries * hidden)  # fmt: skip
    pieces = min(entries, number) + entries // 112
    places = entries + 32 * pieces
    many = (8, 16 * pieces, places // 4, 4 * places, 4 * places, 4 * places, 2 * places * inner,
            max(2 * places, 4 * entries) * hidden)  # fmt: skip
    return max(sum(-(-n // 256) * 256 for n in parts) for parts in (few, many))


def _check(x: Array, picks: Array, weights: Array, experts: ExpertWeights) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"apply_experts: x is {x.dtype} {x.shape}, expected bfloat16 or float32 (T, hidden)")
    if picks.ndim != 2 or picks.shape[0] != x.shape[0] or weights.shape != picks.shape:
        raise ValueError(
            f"apply_experts: picks have shape {picks.shape} and weights {weights.shape}, expected ({x.shape[0]}, k)"
        )
    if picks.dtype != jnp.int32 or weights.dtype != jnp.float32:
        raise ValueError(
            f"apply_experts: picks are {picks.dtype} and weights {weights.dtype}, expected int32 and float32"
        )
    hidden = x.shape[1]
    number, inner = experts.w1.codes.shape[:2]
    for name, weight in experts._asdict().items():
        rows, columns = (hidden, inner) if name == "w2" else (inner, hidden)
        shapes = ((number, rows, columns // 2), (number, rows, columns // GROUP))
        if columns % GROUP or (weight.codes.shape, weight.scale.shape) != shapes:
            raise ValueError(
                f"apply_experts: {name} has codes {weight.codes.shape} and scale {weight.scale.shape}, expected "
                f"{shapes[0]} and {shapes[1]}, with columns a multiple of {GROUP}"
            )
        if weight.codes.dtype != jnp.uint8 or weight.scale.dtype != jnp.uint8:
            raise ValueError(
                f"apply_experts: {name} is {weight.codes.dtype} with a scale of {weight.scale.dtype}, expected uint8"
            )
