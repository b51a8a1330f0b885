"""A model over a mesh of devices: its experts spread, everything else a copy on each."""

import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..cache.sharding import check_mesh
from .config import DSV4Config
from .transformer import DSV4Model

_EXPERTS = re.compile(r".*\.ffn\.experts\.w[123](_scale)?")


def check_shards(config: DSV4Config, mesh: Any) -> Mesh:
    """The mesh as `check_mesh` gives it; ValueError where the model cannot be spread over it."""
    mesh = check_mesh(mesh)
    devices = mesh.devices.size
    if config.n_routed_experts % devices:
        raise ValueError(
            f"the mesh has {devices} devices and the model {config.n_routed_experts} routed experts: expected a number "
            "of devices that divides them"
        )
    return mesh


def weight_spec(name: str, mesh: Mesh) -> PartitionSpec:
    """How a weight lies on the mesh: routed experts are spread over all devices.

    Args:
      name: canonical, such as "layers.0.ffn.experts.w1".
      mesh: from `check_shards`.
    """
    return PartitionSpec(tuple(mesh.axis_names)) if _EXPERTS.fullmatch(name) else PartitionSpec()


def shard_model(model: DSV4Model, mesh: Any) -> DSV4Model:
    """The model with its weights on a mesh: each of N devices has 1 / N of the routed experts, and all the rest.

    It runs inside `jax.shard_map` over the mesh, each device with its own tokens, cache and plan, as `DecodeLoop` does
    it with a `ShardedKVCacheManager`. Results differ from those of one device by what `exchange` says.

    Args:
      model: on one device, or on a mesh already.
      mesh: with an axis "data".

    Returns:
      Another model; the one given is as it was.

    Raises:
      ValueError: a mesh that `check_mesh` refuses, or whose devices do not divide the experts.
    """
    mesh = check_shards(model.config, mesh)
    graphdef, state = nnx.split(model)

    def place(path: tuple, variable: Any) -> Any:
        spec = weight_spec(".".join(map(str, path)), mesh)
        return variable.replace(jax.device_put(variable[...], NamedSharding(mesh, spec)))

    return with_mesh(nnx.merge(graphdef, nnx.map_state(place, state)), mesh)


def with_mesh(model: DSV4Model, mesh: Mesh) -> DSV4Model:
    """The model, told that its weights lie on this mesh as `weight_spec` says."""
    model.mesh = mesh
    for block in model.layers:
        block.ffn.experts.axes = tuple(mesh.axis_names)
    return model
