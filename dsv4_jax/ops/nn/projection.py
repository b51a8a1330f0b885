"""A product with weights in the released FP8 form: E4M3 codes with a power-of-two scale per block of 128x128."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..formats.fp4 import power_of_two
from ..formats.fp8 import decode_e4m3

Array = jax.Array

BLOCK = 128
"""Rows and columns that share a scale."""


class BlockScaledWeight(NamedTuple):
    """A weight as the release stores it; the value of an element is E4M3(code) * 2^(scale - 127).

    Attributes:
      codes: (N, K) uint8, the bits of E4M3 values.
      scale: (ceil(N / 128), ceil(K / 128)) uint8, the bits of E8M0 values.
    """

    codes: Array
    scale: Array


def dequantise_weight(weight: BlockScaledWeight) -> Array:
    """The weight's values (N, K) float32."""
    rows, columns = weight.codes.shape
    scale = jnp.repeat(jnp.repeat(power_of_two(weight.scale), BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return decode_e4m3(weight.codes) * scale


def project(x: Array, weight: BlockScaledWeight, *, implementation: str | None = None) -> Array:
    """y = x W^T, with the weight kept as released.

    Sums are taken in float32 or better: from the same stored weight a result is within 2e-3 (relative, L2) of the exact
    one for bfloat16 x, whose own rounding of y that is, and within 1e-5 for float32. A row's bits depend on shapes and
    on that row alone.

    Args:
      x: (..., K) bfloat16 or float32.
      weight: codes (N, K), scale (ceil(N / 128), ceil(K / 128)).
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one that serves.

    Returns:
      (..., N), of x's dtype.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot be used.
    """
    if not x.ndim or x.shape[-1:] != weight.codes.shape[1:]:
        raise ValueError(
            f"project: x has shape {x.shape} and the weight {weight.codes.shape}, expected (..., K) and (N, K)"
        )
    flat = x.reshape(-1, 1, x.shape[-1])
    return _grouped(flat, weight, implementation).reshape(*x.shape[:-1], weight.codes.shape[0])


def project_groups(x: Array, weight: BlockScaledWeight, *, implementation: str | None = None) -> Array:
    """As `project`, each of G groups of x with its own N rows of the weight.

    Args:
      x: (..., G, K) bfloat16 or float32.
      weight: codes (G * N, K): rows g * N … are group g's.
      implementation: as in `project`.

    Returns:
      (..., G, N), of x's dtype.

    Raises:
      ValueError: as in `project`.
    """
    if x.ndim < 2 or x.shape[-1:] != weight.codes.shape[1:] or weight.codes.shape[0] % x.shape[-2]:
        raise ValueError(
            f"project_groups: x has shape {x.shape} and the weight {weight.codes.shape}, "
            "expected (..., G, K) and (G * N, K)"
        )
    y = _grouped(x.reshape(-1, *x.shape[-2:]), weight, implementation)
    return y.reshape(*x.shape[:-1], -1)


def _grouped(x: Array, weight: BlockScaledWeight, implementation: str | None) -> Array:
    """x (T, G, K), weight (G * N, K) -> (T, G, N)."""
    rows, columns = weight.codes.shape
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"project: x is {x.dtype}, expected bfloat16 or float32")
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if weight.codes.dtype != jnp.uint8 or weight.scale.dtype != jnp.uint8 or weight.scale.shape != expected:
        raise ValueError(
            f"project: the weight has codes {weight.codes.dtype} {weight.codes.shape} and scale {weight.scale.dtype} "
            f"{weight.scale.shape}, expected uint8 and a scale of shape {expected}"
        )
    groups = x.shape[1]

    def in_jnp(x: Array, weight: BlockScaledWeight) -> Array:
        values = dequantise_weight(weight).reshape(groups, -1, columns)
        y = jnp.einsum("tgk,gnk->tgn", x.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST)
        return y.astype(x.dtype)

    def in_native(x: Array, weight: BlockScaledWeight) -> Array:
        result = jax.ShapeDtypeStruct((*x.shape[:2], rows // groups), x.dtype)

        def on_cpu(x: Array, codes: Array, scale: Array) -> Array:
            return dispatch.ffi_call("dsv4_project", result)(x, codes, scale)

        def on_cuda(x: Array, codes: Array, scale: Array) -> Array:
            columns_at_once, scratch = _plan(x.shape[0], groups, rows, columns)
            call = dispatch.ffi_call("dsv4_project", (result, jax.ShapeDtypeStruct((scratch,), jnp.uint8)))
            return call(x, codes, scale, slice=np.int64(columns_at_once))[0]

        return dispatch.on_platform(x, *weight, default=on_cpu, cuda=on_cuda)

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return None
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {x.dtype}"
        if columns % 512 or (rows // groups) % 256:
            return f"it takes multiples of 512 columns and of 256 rows in a group, not {columns} and {rows // groups}"
        return None

    return dispatch.call("project", implementation, limit, in_native, in_jnp, x, weight)


def _plan(tokens: int, groups: int, rows: int, columns: int) -> tuple[int, int]:
    """How the CUDA form multiplies: columns that a block sums (0: all of them), and bytes of scratch."""
    large = rows * columns >= 2**24
    if tokens <= 2 and not large:
        return 0, 0
    if tokens <= 64:
        at_once = 1024 if large and columns % 1024 == 0 else 512
        places = next(n for n in (4, 8, 16, 32, 64) if n >= tokens)
        split = groups * places * (2 * columns + 4) if places > 8 else 0
        return at_once, split + (4 * tokens * rows * (columns // at_once) if columns > at_once else 0)
    return 0, tokens * groups * (2 * columns + 4)
