"""From a checkpoint folder to a model."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint import load_tensors
from .config import DSV4Config
from .transformer import DSV4Model


def from_pretrained(path: str | os.PathLike[str], dtype: Any = jnp.float32, **overrides: Any) -> DSV4Model:
    """The model of the checkpoint in folder `path`, computing in `dtype` (float32 or bfloat16).

    overrides: fields of the configuration to change, such as index_topk=512. Raises FileNotFoundError for a missing
    file, ValueError for one that is not what the configuration says, or an unknown field.
    """
    config = DSV4Config.from_hf(path)
    if overrides:
        config = config.replace(**overrides)
    tensors = load_tensors(path, config, dtype)
    model = nnx.eval_shape(lambda: DSV4Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def fill(key_path: tuple, variable: Any) -> Any:
        name = ".".join(str(part) for part in key_path)
        array = jax.device_put(tensors[name])
        if array.shape != variable.shape or array.dtype != variable.dtype:
            raise ValueError(
                f"tensor {name} is {array.dtype}{array.shape}, the model needs {variable.dtype}{variable.shape}"
            )
        return variable.replace(array)

    return nnx.merge(graphdef, nnx.map_state(fill, state))
