"""A product with weights in the released FP8 form: E4M3 codes with a power-of-two scale per block of 128x128."""

from collections.abc import Sequence
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

MOST_WEIGHTS = 3
"""Weights that the CUDA form multiplies with in one launch."""

IN_PIECES = 512
"""Tokens up to which the CUDA form multiplies 64 at a time, each piece reading the weight; more share one reading."""


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
    return project_each(x, (weight,), implementation=implementation)[0]


def project_each(
    x: Array, weights: Sequence[BlockScaledWeight], *, implementation: str | None = None
) -> tuple[Array, ...]:
    """As `project`, with each of several weights of the same input; on a GPU in one launch.

    Args:
      x: (..., K) bfloat16 or float32.
      weights: codes (N, K) each.
      implementation: as in `project`.

    Returns:
      A result (..., N) for each weight.

    Raises:
      ValueError: as in `project`.
    """
    for weight in weights:
        if not x.ndim or x.shape[-1:] != weight.codes.shape[1:]:
            raise ValueError(
                f"project: x has shape {x.shape} and the weight {weight.codes.shape}, expected (..., K) and (N, K)"
            )
    results: list[Array] = []
    for first in range(0, len(weights), MOST_WEIGHTS):
        results += _grouped(x.reshape(-1, 1, x.shape[-1]), weights[first : first + MOST_WEIGHTS], implementation)
    return tuple(y.reshape(*x.shape[:-1], w.codes.shape[0]) for y, w in zip(results, weights, strict=True))


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
    (y,) = _grouped(x.reshape(-1, *x.shape[-2:]), (weight,), implementation)
    return y.reshape(*x.shape[:-1], -1)


def _grouped(x: Array, weights: Sequence[BlockScaledWeight], implementation: str | None) -> tuple[Array, ...]:
    """x (T, G, K), weights (G * N, K) -> (T, G, N) each; with more than one G is 1."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"project: x is {x.dtype}, expected bfloat16 or float32")
    groups, columns = x.shape[1:]
    for codes, scale in weights:
        expected = (-(-codes.shape[0] // BLOCK), -(-columns // BLOCK))
        if codes.dtype != jnp.uint8 or scale.dtype != jnp.uint8 or scale.shape != expected:
            raise ValueError(
                f"project: the weight has codes {codes.dtype} {codes.shape} and scale {scale.dtype} {scale.shape}, "
                f"expected uint8 and a scale of shape {expected}"
            )
    rows = [weight.codes.shape[0] // groups for weight in weights]

    def in_jnp(x: Array, *weights: BlockScaledWeight) -> tuple[Array, ...]:
        def product(weight: BlockScaledWeight) -> Array:
            values = dequantise_weight(weight).reshape(groups, -1, columns)
            y = jnp.einsum("tgk,gnk->tgn", x.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST)
            return y.astype(x.dtype)

        return tuple(map(product, weights))

    def in_native(x: Array, *weights: BlockScaledWeight) -> tuple[Array, ...]:
        results = [jax.ShapeDtypeStruct((*x.shape[:2], n), x.dtype) for n in rows]

        def on_cpu(x: Array, *weights: BlockScaledWeight) -> tuple[Array, ...]:
            calls = [dispatch.ffi_call("dsv4_project", result) for result in results]
            return tuple(call(x, *weight) for call, weight in zip(calls, weights, strict=True))

        def on_cuda(x: Array, *weights: BlockScaledWeight) -> tuple[Array, ...]:
            columns_at_once, scratch = _plan(x.shape[0], groups, groups * sum(rows), columns)
            call = dispatch.ffi_call("dsv4_project", (*results, jax.ShapeDtypeStruct((scratch,), jnp.uint8)))
            return tuple(call(x, *jax.tree.leaves(weights), slice=np.int64(columns_at_once))[:-1])

        return dispatch.on_platform(x, *weights, default=on_cpu, cuda=on_cuda)

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return None
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {x.dtype}"
        if columns % 512 or any(n % 256 for n in rows):
            return f"it takes multiples of 512 columns and of 256 rows in a group, not {columns} and {rows}"
        return None

    return dispatch.call("project", implementation, limit, in_native, in_jnp, x, *weights)


def _plan(tokens: int, groups: int, rows: int, columns: int) -> tuple[int, int]:
    """How the CUDA form multiplies: columns that a block sums (0: all of them), and bytes of scratch."""
    large = rows * columns >= 2**24
    if tokens <= 2 and rows * columns <= 2**24:
        return 0, 0
    if tokens <= IN_PIECES:
        at_once = 1024 if large and columns % 1024 == 0 else 512
        piece = min(tokens, 64)
        places = next(n for n in (4, 8, 16, 32, 64) if n >= piece)
        split = groups * places * (2 * columns + 4) if places > 8 else 0
        return at_once, split + (4 * piece * rows * (columns // at_once) if columns > at_once else 0)
    return 0, tokens * groups * (2 * columns + 4)
