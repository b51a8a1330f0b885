"""Items per layer, made when asked for."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Stack = TypeVar("Stack")


@jax.jit
def take_layer(stack: Stack, index: int | jax.Array) -> Stack:
    """One layer of a pytree whose arrays are stacked over layers: one program for all of them, whichever layer."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


class LayerViews:
    """One item per layer, sliced from the stacked arrays when asked for."""

    def __init__(self, length: int, view: Callable[[int], Any]):
        self._length, self._view = length, view

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return (self[layer_idx] for layer_idx in range(self._length))

    def __getitem__(self, layer_idx: int | slice) -> Any:
        """The layer's view, or the list of those in a slice; negative indices count from the end."""
        if isinstance(layer_idx, slice):
            return [self[i] for i in range(*layer_idx.indices(self._length))]
        layer_idx = operator.index(layer_idx)
        if not -self._length <= layer_idx < self._length:
            raise IndexError(f"layer {layer_idx}: the model has layers 0 to {self._length - 1}")
        return self._view(layer_idx % self._length)
