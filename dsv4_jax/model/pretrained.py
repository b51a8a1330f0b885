"""From a checkpoint folder to a model."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..cache.sharding import MODEL
from .config import DSV4Config
from .files.checkpoint import Progress, float_type, read_stored_tensors, read_tensors, result_bytes
from .sharding import check_fit, check_shards, local_experts, place_weight, with_mesh
from .transformer import DSV4Model

_WEIGHTS: dict[str, Any] = {"bf16": jnp.bfloat16, "float32": jnp.float32}


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    weights: str | None = None,
    mesh: Any = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> DSV4Model:
    """The model of the checkpoint in folder `path`.

    Weights may be float32, float16 or bfloat16, or quantised as released ones are (FP8 with scales per 128x128, FP4
    experts with scales per 32); draft layers are skipped. Tensors go to the device one by one.

    Args:
      path: the folder, with its config.json.
      dtype: what the model computes in, float32 or bfloat16; None takes float32, or the type of `weights`. On GPUs the
        native products with quantised weights take bfloat16 alone.
      weights: None holds them as they are stored: FP8 projections and FP4 experts in their bytes, narrower floats than
        `dtype` as they are. "bf16" and "float32" convert all of them to that type.
      mesh: a `jax.sharding.Mesh` with an axis "data": the model is spread over it as by `shard_model`. A process reads
        the experts of its own devices and everything else, once.
      progress: called with the bytes done and the bytes of all.
      **overrides: fields of the configuration to change, such as index_topk=512.

    Returns:
      The model, its weights on the default device, or on the mesh.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not what the configuration says, a scale is no power of two where weights stay as they are
        stored, an unknown type or field, weights that do not fit, or a mesh over which the model cannot be spread.
    """
    given: Any = path
    if not isinstance(given, (str, os.PathLike)) or os.path.isfile(given):
        raise ValueError(f"from_pretrained got {given!r}: expected the folder of a checkpoint")
    config = DSV4Config.from_hf(path)
    if overrides:
        config = config.replace(**overrides)
    if weights not in (None, *_WEIGHTS):
        raise ValueError(f"weights is {weights!r}: expected None, {' or '.join(map(repr, _WEIGHTS))}")
    if dtype is None:
        dtype = _WEIGHTS["float32" if weights is None else weights]
    dtype = float_type(dtype)  # also where the weights have another
    devices, model_devices, experts = 1, 1, None
    if mesh is not None:
        mesh = check_shards(config, mesh)
        devices, experts = mesh.devices.size, local_experts(config, mesh)
        model_devices = mesh.shape.get(MODEL, 1)
    if weights is None:
        needed, tensors = read_stored_tensors(  # checks the files
            path, config, dtype, progress, experts=experts, devices=devices, model_devices=model_devices
        )
    else:
        needed = result_bytes(config, _WEIGHTS[weights], devices, model_devices)
        tensors = read_tensors(path, config, _WEIGHTS[weights], progress, experts=experts)
    check_fit(needed, os.fspath(path), mesh)
    arrays: dict[str, jax.Array] = {}
    for name, array in tensors:
        same = name == "head.weight" and config.tie_word_embeddings
        arrays[name] = arrays["embed.weight"] if same else place_weight(name, array, mesh).block_until_ready()
        del array  # before the next is made
    return model_of(config, dtype, arrays, mesh)


def model_of(config: DSV4Config, dtype: Any, arrays: Mapping[str, jax.Array], mesh: Mesh | None = None) -> DSV4Model:
    """The model with these arrays, by their canonical names; codes (uint8) have their scales beside them.

    mesh: the one that the arrays lie on.
    """
    model = nnx.eval_shape(lambda: DSV4Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    for name, scale in arrays.items():
        owner, attribute = _owner(model, name)
        if attribute.endswith("scale") and not hasattr(owner, attribute):
            setattr(owner, attribute, nnx.Param(jax.ShapeDtypeStruct(scale.shape, scale.dtype)))
    graphdef, state = nnx.split(model)

    def fill(key_path: tuple, variable: Any) -> Any:
        name = ".".join(str(part) for part in key_path)
        array = arrays[name]
        # Codes have their scales beside them, and the files' shapes were compared with the configuration's.
        if array.dtype != jnp.uint8 and array.shape != variable.shape:
            raise ValueError(
                f"tensor {name} is {array.dtype}{array.shape}, the model needs {variable.dtype}{variable.shape}"
            )
        return variable.replace(array)

    model = nnx.merge(graphdef, nnx.map_state(fill, state))
    return model if mesh is None else with_mesh(model, mesh)


def _owner(model: Any, name: str) -> tuple[Any, str]:
    """The module that has the tensor with this canonical name, and the name of its attribute."""
    *path, attribute = name.split(".")
    for part in path:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model, attribute
