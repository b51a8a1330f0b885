"""A product with weights in the released FP8 form: E4M3 codes with a power-of-two scale per block of 128x128."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..formats.fp4 import power_of_two
from ..formats.fp8 import decode_e4m3
from .rms_norm import rms_norm
from .swiglu import swiglu

Array = jax.Array

BLOCK = 128
"""Rows and columns that share a scale."""

MOST_WEIGHTS = 3
"""Weights that the CUDA form multiplies with in one launch."""

PIECE = 64
"""Tokens that the CUDA form takes through two products in one call, and at once where they are few."""

IMAGE = 128
"""Tokens that share a reading of the weight where they are many."""


class Normed(NamedTuple):
    """x is normed before it is multiplied, `rms_norm(x, weight, eps=eps)`.

    Attributes:
      weight: (K,) float32.
      eps: of the norm.
    """

    weight: Array
    eps: float


class Gated(NamedTuple):
    """x is a gate, `swiglu(x, up, limit)` is what is multiplied.

    Attributes:
      up: as x.
      limit: of SwiGLU.
    """

    up: Array
    limit: float


def prepared(x: Array, before: Normed | Gated | None) -> Array:
    """What becomes of x (..., K) before it is multiplied, in its dtype."""
    if before is None:
        return x
    return rms_norm(x, before.weight, eps=before.eps) if isinstance(before, Normed) else swiglu(x, *before)


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


def project(
    x: Array, weight: BlockScaledWeight, *, before: Normed | Gated | None = None, implementation: str | None = None
) -> Array:
    """y = x W^T, with the weight kept as released.

    Sums are taken in float32 or better: from the same stored weight a result is within 2e-3 (relative, L2) of the exact
    one for bfloat16 x, whose own rounding of y that is, and within 1e-5 for float32. A row's bits depend on shapes and
    on that row alone.

    Args:
      x: (..., K) bfloat16 or float32.
      weight: codes (N, K), scale (ceil(N / 128), ceil(K / 128)).
      before: what becomes of x first.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one that serves.

    Returns:
      (..., N), of x's dtype.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot be used.
    """
    return project_each(x, (weight,), before=before, implementation=implementation)[0]


def project_each(
    x: Array,
    weights: Sequence[BlockScaledWeight],
    *,
    before: Normed | Gated | None = None,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """As `project`, with each of several weights of the same input; on a GPU in one launch.

    Args:
      x: (..., K) bfloat16 or float32.
      weights: codes (N, K) each.
      before, implementation: as in `project`.

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
    if isinstance(before, Normed) and (before.weight.shape != x.shape[-1:] or before.weight.dtype != jnp.float32):
        raise ValueError(
            f"project: the norm's weight is {before.weight.dtype} {before.weight.shape}, "
            f"expected float32 {x.shape[-1:]}"
        )
    if isinstance(before, Gated) and (before.up.shape != x.shape or before.up.dtype != x.dtype):
        raise ValueError(f"project: up is {before.up.dtype} {before.up.shape}, expected {x.dtype} {x.shape}, as x")
    rows = math.prod(x.shape[:-1]), 1, x.shape[-1]
    if isinstance(before, Gated):
        before = before._replace(up=before.up.reshape(rows))
    results: list[Array] = []
    for first in range(0, len(weights), MOST_WEIGHTS):
        some = weights[first : first + MOST_WEIGHTS]
        results += _grouped(x.reshape(rows), some, implementation, before)
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
    if x.ndim < 2 or x.shape[-1:] != weight.codes.shape[1:] or not x.shape[-2] or weight.codes.shape[0] % x.shape[-2]:
        raise ValueError(
            f"project_groups: x has shape {x.shape} and the weight {weight.codes.shape}, "
            "expected (..., G, K) and (G * N, K)"
        )
    (y,) = _grouped(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), (weight,), implementation)
    return y.reshape(*x.shape[:-1], weight.codes.shape[0] // x.shape[-2])


def project_through(
    x: Array,
    firsts: Sequence[BlockScaledWeight],
    second: BlockScaledWeight,
    *,
    norm: Normed | None = None,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """Products of x, and one of the first of their results: on a GPU the second begins to read its weight before.

    Args:
      x: (T, G, K) bfloat16 or float32.
      firsts: codes (G * N, K) each, rows g * N … are group g's; with more than one G is 1.
      second: codes (M, G * N) of the first's.
      norm: the second product is of the first result normed, its weight (G * N,).
      implementation: "jnp" or "cuda"; None takes the native one where it serves, and products one by one elsewhere.

    Returns:
      (T, G * N) for each of `firsts`, then (T, M), of x's dtype.

    Raises:
      ValueError: as in `project`.
    """
    shapes = [weight.codes.shape for weight in firsts]
    if (
        x.ndim != 3
        or not firsts
        or (len(firsts) > 1 and x.shape[1] != 1)
        or any(shape[1:] != x.shape[2:] or not x.shape[1] or shape[0] % x.shape[1] for shape in shapes)
    ):
        raise ValueError(
            f"project_through: x has shape {x.shape} and the first weights {', '.join(map(str, shapes)) or 'none'}, "
            "expected (T, G, K) and (G * N, K), G 1 where there are several"
        )
    tokens, groups, columns = x.shape
    rows = [shape[0] for shape in shapes]
    if second.codes.shape[1:] != (rows[0],):
        raise ValueError(
            f"project_through: the second weight has shape {second.codes.shape}, expected (M, {rows[0]}), the rows of "
            "the first as columns"
        )
    if norm is not None and (norm.weight.shape != (rows[0],) or norm.weight.dtype != jnp.float32):
        raise ValueError(
            f"project_through: the norm's weight is {norm.weight.dtype} {norm.weight.shape}, "
            f"expected float32 ({rows[0]},)"
        )
    between, eps = norm or (None, 0.0)

    def one_by_one(x: Array, between: Array | None, second: BlockScaledWeight, *firsts: BlockScaledWeight) -> Any:
        inner = implementation if implementation == "jnp" else None
        results = [y.reshape(tokens, n) for y, n in zip(_grouped(x, firsts, inner), rows, strict=True)]
        before = None if between is None else Normed(between, eps)
        return (*results, project(results[0], second, before=before, implementation=inner))

    def in_native(x: Array, between: Array | None, second: BlockScaledWeight, *firsts: BlockScaledWeight) -> Any:
        plans = _plan(tokens, groups, sum(rows), columns), _plan(tokens, 1, *second.codes.shape)
        results = [jax.ShapeDtypeStruct((tokens, n), x.dtype) for n in (*rows, second.codes.shape[0])]
        scratch = jax.ShapeDtypeStruct((max(size for _, size in plans),), jnp.uint8)
        call: Any = dispatch.ffi_call("dsv4_project", (*results, scratch))
        return tuple(
            call(
                *jax.tree.leaves((x, between, firsts, second)), slice=np.int64(plans[0][0]),
                normed=np.int64(norm is not None), gated=np.int64(0), number=np.float32(eps),
                then=np.int64(plans[1][0]),
            )[:-1]
        )  # fmt: skip

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16 or not 0 < tokens <= PIECE or len(firsts) > (MOST_WEIGHTS if groups == 1 else 1):
            return f"it takes 1 to {PIECE} tokens of bfloat16 and {MOST_WEIGHTS} weights without groups"
        if any(n // groups % 256 for n in rows) or columns % 512 or second.codes.shape[0] % 256 or rows[0] % 512:
            return "it takes multiples of 512 columns and of 256 rows in a group"
        return None

    return dispatch.call("project_through", implementation, limit, in_native, one_by_one, x, between, second, *firsts)


def _grouped(
    x: Array,
    weights: Sequence[BlockScaledWeight],
    implementation: str | None,
    before: Normed | Gated | None = None,
) -> tuple[Array, ...]:
    """x (T, G, K), weights (G * N, K) -> (T, G, N) each; with more than one, or with `before`, G is 1."""
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

    # What is an array of `before` is an operand.
    array, number = before or (None, 0.0)

    def ready(x: Array, array: Array | None) -> Array:
        return x if before is None or array is None else prepared(x, type(before)(array, number))

    def in_jnp(x: Array, array: Array | None, *weights: BlockScaledWeight) -> tuple[Array, ...]:
        x = ready(x, array)

        def product(weight: BlockScaledWeight) -> Array:
            values = dequantise_weight(weight).reshape(groups, weight.codes.shape[0] // groups, columns)
            y = jnp.einsum("tgk,gnk->tgn", x.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST)
            return y.astype(x.dtype)

        return tuple(map(product, weights))

    def in_native(x: Array, array: Array | None, *weights: BlockScaledWeight) -> tuple[Array, ...]:
        results = [jax.ShapeDtypeStruct((*x.shape[:2], n), x.dtype) for n in rows]

        def on_cpu(x: Array, array: Array | None, *weights: BlockScaledWeight) -> tuple[Array, ...]:
            x = ready(x, array)
            calls = [dispatch.ffi_call("dsv4_project", result) for result in results]
            return tuple(call(x, *weight) for call, weight in zip(calls, weights, strict=True))

        def on_cuda(x: Array, array: Array | None, *weights: BlockScaledWeight) -> tuple[Array, ...]:
            columns_at_once, scratch = _plan(x.shape[0], groups, groups * sum(rows), columns)
            call = dispatch.ffi_call("dsv4_project", (*results, jax.ShapeDtypeStruct((scratch,), jnp.uint8)))
            return tuple(
                call(
                    *jax.tree.leaves((x, array, weights)), slice=np.int64(columns_at_once),
                    normed=np.int64(isinstance(before, Normed)), gated=np.int64(isinstance(before, Gated)),
                    number=np.float32(number), then=np.int64(-1),
                )[:-1]
            )  # fmt: skip

        return dispatch.on_platform(x, array, *weights, default=on_cpu, cuda=on_cuda)

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return None
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if x.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {x.dtype}"
        if not x.shape[0] or not columns or not all(rows):
            return "it takes a token, a column and a row or more"
        if columns % 512 or any(n % 256 for n in rows):
            return f"it takes multiples of 512 columns and of 256 rows in a group, not {columns} and {rows}"
        return None

    return dispatch.call("project", implementation, limit, in_native, in_jnp, x, array, *weights)


def _plan(tokens: int, groups: int, rows: int, columns: int) -> tuple[int, int]:
    """How the CUDA form multiplies: columns that a block sums (0: all of them), and bytes of scratch."""
    # Up to two pieces read a weight twice rather than leave most multiprocessors with nothing to do for long.
    if tokens > PIECE and not (tokens <= 2 * PIECE and rows < 8192 and columns >= 4096):
        return 0, groups * -(-tokens // IMAGE) * IMAGE * (2 * columns + 4)
    if tokens <= 2 and rows * columns <= 2**24:
        return 0, 0
    piece = min(tokens, PIECE)
    places = next(n for n in (4, 8, 16, 32, 64) if n >= piece)
    # As few sums to be added up as leave a block, or two small ones, for each multiprocessor.
    wanted = 256 if places <= 8 else 128
    fitting = [n for n in (2048, 1024, 512) if columns % n == 0 and n * places <= 2**16]
    busy = [n for n in fitting if n == columns <= 1024 or rows // BLOCK * (columns // n) >= wanted]
    at_once = busy[0] if busy else 512
    slices = columns // at_once
    split = groups * places * (2 * columns + 4) if places > 8 else 0
    return at_once, split + (4 * piece * rows * slices if slices > 1 else 0)
