"""Choices that several commands offer."""

import importlib.resources
import pathlib
from enum import StrEnum
from typing import Annotated

import typer


class CacheDtype(StrEnum):
    """How key-value records are stored."""

    fp8 = "fp8"
    fp8_ue8m0 = "fp8_ue8m0"
    bf16 = "bf16"
    fp32 = "fp32"


class IndexerDtype(StrEnum):
    """How indexer keys are stored."""

    nvfp4 = "nvfp4"
    mxfp4 = "mxfp4"
    bf16 = "bf16"
    fp32 = "fp32"


class HcaTail(StrEnum):
    """What HCA layers keep of an open window."""

    full = "full"
    running = "running"


class Dtype(StrEnum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


KeepPrograms = Annotated[
    bool,
    typer.Option(
        "--keep-programs/--no-keep-programs",
        help="Keep compiled programs for the next run, in ~/.cache/dsv4_jax or where JAX_COMPILATION_CACHE_DIR says.",
    ),
]


def packaged_checkpoint() -> pathlib.Path:
    """The small checkpoint that comes with the package."""
    return pathlib.Path(str(importlib.resources.files("dsv4_jax") / "data" / "tiny_dsv4"))


def default_indexer(cache_dtype: str) -> str:
    """The form of indexer keys that goes with records in `cache_dtype`."""
    from dsv4_jax.cache.formats import DEFAULT_INDEXER_FORMAT

    return DEFAULT_INDEXER_FORMAT[cache_dtype]
