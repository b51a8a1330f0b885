"""Setting rows of an array in place, also where XLA would copy the whole array."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import dispatch


def set_rows(array: Array, indices: tuple[Array | int, ...], values: Array) -> Array:
    """``array.at[indices].set(values)`` for T distinct rows; rows out of range (negative ones too) are dropped.

    XLA:CPU widens a bfloat16 scatter, and with it the whole array, to float32: it copies the array twice for every
    write. There the native library writes the rows in place; everywhere else, and without it, this is a plain scatter.

    Args:
      array: (n_0, …, n_{k-1}, *row) any dtype.
      indices: k index arrays (T,) int32, or ints and arrays () that stand for T equal ones.
      values: (T, *row), of the array's dtype.
    Returns:
      The array after the writes.
    Raises:
      TypeError: if values are not of the array's dtype, or an index is not int32.
      ValueError: if values or an index array do not have the shapes above.
    """
    tokens = values.shape[:1]
    if values.dtype != array.dtype:
        raise TypeError(f"set_rows: got values {values.dtype}; expected {array.dtype} like the array.")
    if values.shape != (*tokens, *array.shape[len(indices) :]) or not tokens:
        raise ValueError(f"set_rows: got values {values.shape}; expected (T, {array.shape[len(indices) :]}).")
    for i, index in enumerate(indices):
        if not isinstance(index, int) and index.dtype != jnp.int32:
            raise TypeError(f"set_rows: got index {i} {index.dtype}; expected int32.")
        if not isinstance(index, int) and index.shape not in ((), tokens):
            raise ValueError(f"set_rows: got index {i} {index.shape}; expected {tokens}.")
    columns = [jnp.broadcast_to(jnp.asarray(i, jnp.int32), tokens) for i in indices]
    if array.dtype == jnp.bfloat16 and "cpu" in dispatch.available():
        return dispatch.on_platform(array, jnp.stack(columns, axis=-1), values, cpu=_native, default=_scatter)
    return _scatter(array, jnp.stack(columns, axis=-1), values)


def _scatter(array: Array, indices: Array, values: Array) -> Array:
    axes = tuple(range(indices.shape[-1]))
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, values.ndim)), inserted_window_dims=axes, scatter_dims_to_operand_dims=axes
    )
    return lax.scatter(array, indices, values, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _native(array: Array, indices: Array, values: Array) -> Array:
    result = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return dispatch.ffi_call("dsv4_set_rows", result, input_output_aliases={0: 0})(array, indices, values)
