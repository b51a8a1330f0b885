"""From a checkpoint folder to a model."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DSV4Config
from .files.checkpoint import Progress, check_memory, read_tensors, result_bytes
from .transformer import DSV4Model


def from_pretrained(
    path: str | os.PathLike[str], dtype: Any = jnp.float32, *, progress: Progress | None = None, **overrides: Any
) -> DSV4Model:
    """The model of the checkpoint in folder `path`, computing in `dtype` (float32 or bfloat16).

    Weights may be float32, float16 or bfloat16, or quantised as released ones are (FP8 with scales per 128x128, FP4
    experts with scales per 32); draft layers are skipped. Tensors go to the device one by one.

    progress: called with the bytes done and the bytes of all. overrides: fields of the configuration to change, such as
    index_topk=512. Raises FileNotFoundError for a missing file, ValueError for one that is not what the configuration
    says, or an unknown field.
    """
    given: Any = path
    if not isinstance(given, (str, os.PathLike)) or os.path.isfile(given):
        raise ValueError(f"from_pretrained got {given!r}: expected the folder of a checkpoint")
    config = DSV4Config.from_hf(path)
    if overrides:
        config = config.replace(**overrides)
    tensors = read_tensors(path, config, dtype, progress)  # checks the files
    if jax.default_backend() == "cpu":
        check_memory(result_bytes(config, dtype), os.fspath(path))
    model = nnx.eval_shape(lambda: DSV4Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    arrays: dict[str, jax.Array] = {}
    for name, array in tensors:
        same = name == "head.weight" and config.tie_word_embeddings
        arrays[name] = arrays["embed.weight"] if same else jax.device_put(array).block_until_ready()
        del array  # before the next is made

    def fill(key_path: tuple, variable: Any) -> Any:
        name = ".".join(str(part) for part in key_path)
        array = arrays[name]
        if array.shape != variable.shape or array.dtype != variable.dtype:
            raise ValueError(
                f"tensor {name} is {array.dtype}{array.shape}, the model needs {variable.dtype}{variable.shape}"
            )
        return variable.replace(array)

    return nnx.merge(graphdef, nnx.map_state(fill, state))
