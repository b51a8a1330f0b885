"""The storage formats by name, and what they cost."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..ops.formats.fp4 import GROUP_SIZE
from ..ops.formats.record import Record
from ..ops.formats.ue8m0 import scale_bytes
from ..ops.write.compress import IndexerKeys


@dataclass(frozen=True)
class RecordFormat:
    """How one key-value vector is stored."""

    name: str
    nope_dtype: DTypeLike
    rope_dtype: DTypeLike
    scale_dtype: DTypeLike | None  # float32: one a record; uint8: a power of two per 64 values; None: stored exactly

    def allocate(self, shape: tuple[int, ...], nope_dim: int, rope_dim: int) -> Record:
        """Zero records of leading shape `shape`."""
        return Record(
            nope=jnp.zeros((*shape, nope_dim), self.nope_dtype),
            rope=jnp.zeros((*shape, rope_dim), self.rope_dtype),
            inv_scale=None
            if self.scale_dtype is None
            else jnp.zeros(self._scale_shape(shape, nope_dim), self.scale_dtype),
        )

    def _scale_shape(self, shape: tuple[int, ...], nope_dim: int) -> tuple[int, ...]:
        return (*shape, scale_bytes(nope_dim)) if self.scale_dtype == jnp.uint8 else shape

    def record_bytes(self, nope_dim: int, rope_dim: int) -> int:
        """Bytes of one record."""
        scale = 0
        if self.scale_dtype is not None:
            scale = math.prod(self._scale_shape((), nope_dim)) * jnp.dtype(self.scale_dtype).itemsize
        return nope_dim * jnp.dtype(self.nope_dtype).itemsize + rope_dim * jnp.dtype(self.rope_dtype).itemsize + scale


RECORD_FORMATS = {
    "fp8": RecordFormat("fp8", jnp.uint8, jnp.bfloat16, jnp.float32),
    "fp8_ue8m0": RecordFormat("fp8_ue8m0", jnp.uint8, jnp.bfloat16, jnp.uint8),
    "bf16": RecordFormat("bf16", jnp.bfloat16, jnp.bfloat16, None),
    "fp32": RecordFormat("fp32", jnp.float32, jnp.float32, None),
}
INDEXER_FORMATS = ("nvfp4", "mxfp4", "bf16", "fp32")
DEFAULT_INDEXER_FORMAT = {"fp8": "nvfp4", "fp8_ue8m0": "mxfp4", "bf16": "bf16", "fp32": "fp32"}


def record_format(name: str) -> RecordFormat:
    """The format called `name`; ValueError with the known names otherwise."""
    given: Any = name
    if not isinstance(given, str) or name not in RECORD_FORMATS:
        raise ValueError(f"cache_dtype {name!r} is not known: choose one of {sorted(RECORD_FORMATS)}")
    return RECORD_FORMATS[name]


def check_indexer_format(name: str) -> str:
    """`name`, or ValueError with the known names."""
    if name not in INDEXER_FORMATS:
        raise ValueError(f"indexer_dtype {name!r} is not known: choose one of {sorted(INDEXER_FORMATS)}")
    return name


def check_dimensions(cache_dtype: str, nope_dim: int, indexer_dtype: str, index_head_dim: int | None) -> None:
    """ValueError unless the formats store records and keys of these widths; index_head_dim None: there are no keys."""
    if RECORD_FORMATS[cache_dtype].scale_dtype == jnp.uint8:
        scale_bytes(nope_dim)
    group = GROUP_SIZE.get(indexer_dtype)
    # A power of two, because these keys are rotated by a Hadamard matrix.
    if group and index_head_dim and (index_head_dim % group or index_head_dim & (index_head_dim - 1)):
        raise ValueError(
            f"indexer_dtype {indexer_dtype!r} stores keys whose width is a power of two and at least {group}, not "
            f"index_head_dim = {index_head_dim}"
        )


def allocate_keys(name: str, shape: tuple[int, ...], dim: int) -> IndexerKeys:
    """Zero indexer keys of `dim` values and leading shape `shape`."""
    if name in GROUP_SIZE:
        groups = dim // GROUP_SIZE[name]
        return IndexerKeys(jnp.zeros((*shape, dim // 2), jnp.uint8), jnp.zeros((*shape, groups), jnp.uint8))
    return IndexerKeys(jnp.zeros((*shape, dim), jnp.bfloat16 if name == "bf16" else jnp.float32), None)


def key_bytes(name: str, dim: int) -> int:
    """Bytes of one indexer key of `dim` values."""
    if name in GROUP_SIZE:
        return dim // 2 + dim // GROUP_SIZE[name]
    return dim * (2 if name == "bf16" else 4)
