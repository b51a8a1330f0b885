"""A model over a mesh of devices: experts spread over all of them, other weights copied or split along "model"."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..cache.sharding import MODEL, check_mesh
from .config import DSV4Config
from .files.checkpoint import check_memory
from .files.tensor_names import check_division, divided_by
from .transformer import DSV4Model, check_model


def check_shards(config: DSV4Config, mesh: Any) -> Mesh:
    """The mesh as `check_mesh` gives it; ValueError where the model cannot be spread over it."""
    mesh = check_mesh(mesh)
    devices = mesh.devices.size
    if config.n_routed_experts % devices:
        raise ValueError(
            f"the mesh has {devices} devices and the model {config.n_routed_experts} routed experts: expected a number "
            "of devices that divides them"
        )
    parts = mesh.shape.get(MODEL, 1)
    if config.o_groups % parts:
        raise ValueError(
            f'the mesh has {parts} devices along "{MODEL}" and the model {config.o_groups} output groups: expected a '
            "number that divides them"
        )
    return mesh


def weight_spec(name: str, mesh: Mesh) -> PartitionSpec:
    """How a weight lies on the mesh: routed experts are spread over all devices, heads are split along "model".

    Args:
      name: canonical, such as "layers.0.ffn.experts.w1".
      mesh: from `check_shards`.
    """
    whole, rows, columns = PartitionSpec(), PartitionSpec(MODEL), PartitionSpec(None, MODEL)
    experts = PartitionSpec(tuple(mesh.axis_names))
    if mesh.shape.get(MODEL, 1) == 1:
        rows = columns = whole
    return {"experts": experts, "rows": rows, "columns": columns, None: whole}[divided_by(name)]


def weight_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`weight_spec` for an array; ValueError where the devices along an axis do not divide it."""
    check_division(name, shape, mesh.shape.get(MODEL, 1))
    return NamedSharding(mesh, weight_spec(name, mesh))


def shard_model(model: DSV4Model, mesh: Any) -> DSV4Model:
    """The model with its weights on a mesh: each of N devices has 1 / N of the routed experts, and all the rest.

    Along an axis "model" devices have the same tokens and copies of one cache, and divide heads, output groups and the
    shared expert among them, whose results they add in float32. It runs inside `jax.shard_map` over the mesh, each
    device with its own tokens, cache and plan, as `DecodeLoop` does it with a `ShardedKVCacheManager`. Results differ
    from those of one device by what `exchange` says, and by the rounding of these sums.

    Args:
      model: on one device, or on a mesh already.
      mesh: with an axis "data", and perhaps "model" after it.

    Returns:
      Another model; the one given is as it was.

    Raises:
      ValueError: no model, a mesh that `check_mesh` refuses, or whose devices do not divide the experts.
    """
    check_model(model)
    mesh = check_shards(model.config, mesh)
    graphdef, state = nnx.split(model)

    def place(path: tuple, variable: Any) -> Any:
        name = ".".join(map(str, path))
        if mesh.is_multi_process:
            return variable.replace(place_weight(name, np.asarray(variable[...]), mesh))
        return variable.replace(jax.device_put(variable[...], weight_sharding(name, variable.shape, mesh)))

    return with_mesh(nnx.merge(graphdef, nnx.map_state(place, state)), mesh)


def with_mesh(model: DSV4Model, mesh: Mesh) -> DSV4Model:
    """The model, told that its weights lie on this mesh as `weight_spec` says."""
    model.mesh = mesh
    for block in model.layers:
        block.ffn.experts.axes = tuple(mesh.axis_names)
        block.attn.axis = MODEL if mesh.shape.get(MODEL, 1) > 1 else None
    return model


def place_weight(name: str, array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A weight from the host where it belongs: on the mesh as `weight_spec` says, or on the default device."""
    if mesh is None:
        return jax.device_put(array)
    sharding = weight_sharding(name, array.shape, mesh)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_experts(config: DSV4Config, mesh: Mesh) -> frozenset[int]:
    """The routed experts that devices of this process hold."""
    sharding = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    places = sharding.addressable_devices_indices_map((config.n_routed_experts,))
    every = range(config.n_routed_experts)
    return frozenset(expert for index in places.values() for expert in every[(index or (slice(None),))[0]])


def check_fit(needed: int, what: str, mesh: Mesh | None) -> None:
    """ValueError, which says by how much, where devices have less memory than `needed` bytes each.

    mesh: its devices of this process are asked; None: the default device.
    """
    placed = jax.device_put(np.zeros(()))
    if isinstance(placed, jax.core.Tracer):  # shapes are wanted, as by jax.eval_shape, which take no memory
        return
    devices = list(placed.devices()) if mesh is None else mesh.local_devices
    gib = f"{needed / 2**30:,.1f} GiB"
    if devices[0].platform == "cpu":  # they share the machine's
        where = "" if mesh is None else f" on {len(devices)} CPU devices, {gib} each"
        check_memory(needed * len(devices), f"{what}{where}")
        return
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit")
        if memory is not None and needed > memory:
            where = "" if mesh is None else f" on each of {mesh.devices.size} devices"
            raise ValueError(
                f"{what}: its tensors take {gib}{where}, {(needed - memory) / 2**30:,.1f} GiB more than {device} has: "
                "expected more devices, or weights=None, which holds them as they are stored"
            )
