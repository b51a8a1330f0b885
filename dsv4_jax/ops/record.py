"""The record: one key-value vector as the cache stores it.

A vector has `nope` dimensions without position, stored as FP8 with one scale, and `rope` dimensions stored in BF16.
The exact forms keep both halves in BF16 or in float32 and have no scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .fp8 import dequantise_fp8, quantise_fp8, to_bf16

Array = jax.Array


class Record(NamedTuple):
    """Arrays of any leading shape (...) that hold one record per element."""

    nope: Array  # (..., head_dim - rope_dim) uint8 (E4M3 bits) | bfloat16 | float32
    rope: Array  # (..., rope_dim) bfloat16 | float32
    inv_scale: Array | None  # (...) float32, what a stored FP8 value is multiplied by; None in the exact forms


def encode_record(x: Array, like: Record) -> Record:
    """x (..., head_dim) float32 | bfloat16 -> the record in the form of `like` (its dtypes and widths)."""
    split = like.nope.shape[-1]
    nope, rope = x[..., :split], x[..., split:]
    rope = to_bf16(rope.astype(jnp.float32)) if like.rope.dtype == jnp.bfloat16 else rope.astype(like.rope.dtype)
    if like.nope.dtype == jnp.uint8:
        codes, inv_scale = quantise_fp8(nope)
        return Record(codes, rope, inv_scale)
    nope = to_bf16(nope.astype(jnp.float32)) if like.nope.dtype == jnp.bfloat16 else nope.astype(like.nope.dtype)
    return Record(nope, rope, None)


def decode_record(record: Record, dtype: jnp.dtype = jnp.float32) -> Array:
    """Record -> (..., head_dim) of `dtype`: stored * inv_scale for the first part, the rope part as it is."""
    if record.nope.dtype == jnp.uint8:
        nope = dequantise_fp8(record.nope, record.inv_scale, dtype)
    else:
        nope = record.nope.astype(dtype)
    return jnp.concatenate([nope, record.rope.astype(dtype)], axis=-1)
