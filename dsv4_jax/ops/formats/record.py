"""The record: one key-value vector as the cache stores it.

A vector has `nope` dimensions without position, stored as FP8 with one float32 scale or with a power-of-two scale per
64 values, and `rope` dimensions stored in BF16. The exact forms keep both parts in BF16 or in float32, without a scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .fp8 import dequantise_fp8, quantise_fp8, to_bf16
from .ue8m0 import dequantise_ue8m0, quantise_ue8m0, scale_bytes

Array = jax.Array


class Record(NamedTuple):
    """Arrays of any leading shape (...) that hold one record per element."""

    nope: Array  # (..., head_dim - rope_dim) uint8 (E4M3 bits) | bfloat16 | float32
    rope: Array  # (..., rope_dim) bfloat16 | float32
    # What a stored FP8 value is multiplied by: (...) float32, or (..., 8) uint8, E8M0 of 7 groups and a pad byte.
    # None in the exact forms.
    inv_scale: Array | None


def encode_record(x: Array, like: Record) -> Record:
    """x (..., head_dim) float32 | bfloat16 -> the record in the form of `like` (its dtypes and widths)."""
    split = like.nope.shape[-1]
    nope, rope = x[..., :split], x[..., split:]
    rope = to_bf16(rope.astype(jnp.float32)) if like.rope.dtype == jnp.bfloat16 else rope.astype(like.rope.dtype)
    if like.nope.dtype == jnp.uint8 and like.inv_scale is not None:
        codes, inv_scale = (quantise_ue8m0 if like.inv_scale.dtype == jnp.uint8 else quantise_fp8)(nope)
        return Record(codes, rope, inv_scale)
    nope = to_bf16(nope.astype(jnp.float32)) if like.nope.dtype == jnp.bfloat16 else nope.astype(like.nope.dtype)
    return Record(nope, rope, None)


def decode_record(record: Record, dtype: DTypeLike = jnp.float32) -> Array:
    """Record -> (..., head_dim) of `dtype`: stored * inv_scale for the first part, the rope part as it is."""
    if record.nope.dtype == jnp.uint8 and record.inv_scale is not None:
        dequantise = dequantise_ue8m0 if record.inv_scale.dtype == jnp.uint8 else dequantise_fp8
        nope = dequantise(record.nope, record.inv_scale, dtype)
    else:
        nope = record.nope.astype(dtype)
    return jnp.concatenate([nope, record.rope.astype(dtype)], axis=-1)


def native_read_limit(platform: str, record: Record, dtype: DTypeLike) -> str | None:
    """What keeps the native readers for "cpu" or "cuda" from giving these records as `dtype`; None if nothing does."""
    if record.nope.dtype != jnp.uint8:
        return f"it reads only FP8 records (uint8), not {record.nope.dtype}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it gives float32 or bfloat16, not {jnp.dtype(dtype)}"
    widths = (record.nope.shape[-1], record.rope.shape[-1])
    if platform == "cuda" and widths != (448, 64):
        return f"it reads only records of 448 + 64 values, not {widths[0]} + {widths[1]}"
    return None


def pack_records(record: Record) -> Array:
    """ "fp8_ue8m0" records (...) -> bytes (..., 584) uint8, as torch engines lay one out: codes, RoPE half, scales.

    Raises ValueError for records of another form.
    """
    if record.inv_scale is None or record.inv_scale.dtype != jnp.uint8:
        raise ValueError(f"records of {record.nope.dtype} cannot be packed: only the fp8_ue8m0 form has a byte layout")
    rope = jax.lax.bitcast_convert_type(record.rope, jnp.uint8).reshape(*record.rope.shape[:-1], -1)
    return jnp.concatenate([record.nope, rope, record.inv_scale], axis=-1)


def unpack_records(packed: Array, rope_dim: int) -> Record:
    """Inverse of `pack_records`: packed (..., n + 2 * rope_dim + scale_bytes(n)) uint8, or ValueError."""
    rest = packed.shape[-1] - 2 * rope_dim
    nope_dim = next((n for n in range(64, rest, 64) if n + scale_bytes(n) == rest), None)
    if packed.dtype != jnp.uint8 or nope_dim is None:
        raise ValueError(f"packed records are {packed.dtype}{packed.shape}: expected uint8, 584 bytes for 448 + 64")
    rope = packed[..., nope_dim : nope_dim + 2 * rope_dim].reshape(*packed.shape[:-1], rope_dim, 2)
    rope = jax.lax.bitcast_convert_type(rope, jnp.bfloat16)
    return Record(packed[..., :nope_dim], rope, packed[..., nope_dim + 2 * rope_dim :])
