"""What a layer is given to write or to read, checked before anything is traced."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..ops.read.attend import RawQuery
from ..ops.write.compress import CompressorWeights

FLOATS = (jnp.float32, jnp.bfloat16)


def layer_number(layer_idx: Any, layers: int) -> Any:
    """A layer's number as an int, or as it is where it is traced; ValueError for one that the cache does not have."""
    if isinstance(layer_idx, jax.core.Tracer):
        if layer_idx.shape or not jnp.issubdtype(layer_idx.dtype, jnp.integer):
            raise ValueError(f"layer_idx is {layer_idx.dtype} {layer_idx.shape}, expected an integer ()")
        return layer_idx
    try:
        number = operator.index(layer_idx)
    except TypeError:
        raise ValueError(f"layer_idx is {layer_idx!r}, expected an integer") from None
    if not -layers <= number < layers:
        raise ValueError(f"layer_idx is {number}, but the cache has layers 0 to {layers - 1}")
    return number


def check_array(
    layer: object, name: str, x: Any, shape: tuple[Any, ...], dtypes: tuple[Any, ...], why: str = ""
) -> None:
    """ValueError unless x is an array of this shape, in which a letter stands for any number, and of these dtypes."""
    got, expected = getattr(x, "shape", None), str(shape).replace("'", "")
    if got is None or not hasattr(x, "dtype"):
        raise ValueError(f"layer {layer}: {name} is a {type(x).__name__}, expected an array {expected}{why}")
    if len(got) != len(shape) or any(n != m and not isinstance(n, str) for n, m in zip(shape, got, strict=True)):
        raise ValueError(f"layer {layer}: {name} has shape {got}, expected {expected}{why}")
    if x.dtype not in dtypes:
        names = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise ValueError(f"layer {layer}: {name} has dtype {x.dtype}, expected {names}")


def check_rows(layer: object, name: str, x: Any, tokens: int, width: int) -> None:
    """ValueError unless x is (tokens, width) float32 | bfloat16."""
    check_array(layer, name, x, (tokens, width), FLOATS, " (a row for each token of the plan)")


def check_weights(layer: object, weights: Any, ratio: int, lanes: int, dim: int, rope_dim: int) -> None:
    """ValueError unless these are a compressor's weights; a wrong one would broadcast, and compress something else."""
    if not isinstance(weights, CompressorWeights):
        raise ValueError(f"layer {layer}: weights is a {type(weights).__name__}, expected CompressorWeights")
    shapes = ((ratio, lanes * dim), (dim,), (rope_dim // 2,))
    for name, x, shape in zip(CompressorWeights._fields, weights, shapes, strict=True):
        check_array(layer, f"weights.{name}", x, shape, (jnp.float32,))


def check_floating(layer: object, dtype: Any) -> None:
    """ValueError unless dtype is one that values can be read as."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"layer {layer}: dtype is {jnp.dtype(dtype).name}, expected a floating one such as bfloat16")


def check_raw(layer: object, raw: Any, tokens: int, rope_dim: int) -> None:
    """ValueError unless raw says how queries of these tokens are normed and rotated."""
    if not isinstance(raw, RawQuery):
        raise ValueError(f"layer {layer}: raw is a {type(raw).__name__}, expected a RawQuery (cos, sin, eps)")
    for name, x in (("raw.cos", raw.cos), ("raw.sin", raw.sin)):
        check_array(layer, name, x, (tokens, rope_dim // 2), (jnp.float32,))
    check_number(layer, "raw.eps", raw.eps)


def check_number(layer: object, name: str, x: Any) -> None:
    """ValueError unless x is a number of Python's or of numpy's, which a compiled step contains."""
    if not isinstance(x, (int, float, np.number)):
        raise ValueError(f"layer {layer}: {name} is a {type(x).__name__}, expected a Python float")
