"""A cache over a mesh of devices: which axis of an array is split, and how the devices' parts make one cache.

Every device (or group of devices, along the axis "model") holds a whole small cache: its own slots, blocks and tables,
with its own numbering. Laid side by side along the mesh axis "data" the parts are one cache, which a step takes and
returns; inside its `jax.shard_map` a device sees its own part again. Joining and splitting move no byte.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .kv_cache import KVCache

DATA = "data"
"""The mesh axis over which requests, with their slots and blocks, are spread."""

MODEL = "model"
"""The mesh axis along which caches are replicated; a mesh may do without."""


def check_mesh(mesh: Any) -> Mesh:
    """The mesh, its axes of type Auto, as everything here takes it.

    Raises:
      ValueError: no mesh, one without devices, without the axis "data" or with axes other than "data" and "model", a
        device that is in it twice, devices of different kinds, or a shard whose devices belong to several processes.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f'mesh is a {type(mesh).__name__}: expected a jax.sharding.Mesh with an axis "{DATA}"')
    names = tuple(mesh.axis_names)
    if names not in ((DATA,), (DATA, MODEL)):
        raise ValueError(
            f'the mesh has the axes {names}: expected ("{DATA}",), or ("{DATA}", "{MODEL}") to split weights too'
        )
    if not mesh.devices.size:
        raise ValueError(f"the mesh has the shape {mesh.devices.shape}: expected one device or more along every axis")
    if len(set(mesh.devices.flat)) < mesh.devices.size:
        raise ValueError(f"the mesh has a device twice among {mesh.devices.size}: expected each of them once")
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    if len(kinds) > 1:
        raise ValueError(f"the mesh has devices of different kinds, {' and '.join(kinds)}: expected one kind")
    for shard, devices in enumerate(mesh.devices.reshape(mesh.devices.shape[0], -1)):
        if len({device.process_index for device in devices}) > 1:
            raise ValueError(
                f"shard {shard} lies on devices of several processes: expected those of a shard in one process"
            )
    return Mesh(mesh.devices, names)


def has_context_mesh() -> bool:
    """Whether `jax.set_mesh` set one."""
    try:
        return not jax.sharding.get_mesh().empty
    except ValueError:  # inside a function that JAX traces, where nothing runs
        return False


def no_context_mesh() -> contextlib.AbstractContextManager[Any]:
    """Leaves what `jax.set_mesh` set, whose devices JAX would expect a shard's own programs to run on."""
    return jax.set_mesh(None) if has_context_mesh() else contextlib.nullcontext()


def shard_devices(mesh: Mesh) -> list[list[jax.Device]]:
    """The devices of each shard of this process, in the order of the mesh."""
    rows = mesh.devices.reshape(mesh.devices.shape[0], -1).tolist()
    return [row for row in rows if row[0].process_index == jax.process_index()]


def shard_sharding(devices: Sequence[jax.Device]) -> jax.sharding.Sharding:
    """Where the arrays of one shard lie: on its device, or a copy on each of its devices."""
    if len(devices) == 1:
        return jax.sharding.SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), (MODEL,)), PartitionSpec())


def cache_specs(cache: KVCache) -> KVCache:
    """The cache with a `PartitionSpec` for each array: slots and blocks are split over "data".

    State and pools have them on axis 1, after the layers; all others are laid side by side on axis 0.
    """
    stacked = PartitionSpec(None, DATA)
    specs = jax.tree.map(lambda _: PartitionSpec(DATA), cache)
    return specs.replace_state(
        jax.tree.map(lambda _: stacked, cache.state),
        jax.tree.map(lambda _: stacked, cache.paged),
        specs.block_table,
    )


def join_caches(parts: Sequence[KVCache], mesh: Mesh) -> KVCache:
    """One cache of the parts of this process's shards, and of those that other processes join at the same time.

    Args:
      parts: a cache for each shard of this process, all of one size, each where `shard_sharding` says.
      mesh: from `check_mesh`.

    Returns:
      A cache whose arrays are those of the parts, sharded as `cache_specs` says. Nothing is copied: the parts and the
      whole are the same memory, and donating one ends the other.
    """
    specs = jax.tree.leaves(cache_specs(parts[0]))
    shards = mesh.devices.shape[0]
    joined = []
    for spec, arrays in zip(specs, zip(*map(jax.tree.leaves, parts), strict=True), strict=True):
        axis, shape = len(spec) - 1, list(arrays[0].shape)
        shape[axis] *= shards
        pieces = [piece.data for array in arrays for piece in array.addressable_shards]
        joined.append(jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(mesh, spec), pieces))
    return jax.tree.unflatten(jax.tree.structure(parts[0]), joined)


def is_joined(cache: KVCache, like: KVCache) -> bool:
    """Whether the arrays of a cache lie on the mesh as those of another of its size do."""
    pairs = zip(jax.tree.leaves(cache), jax.tree.leaves(like), strict=True)
    return all(
        isinstance(x, jax.Array) and (x.sharding == y.sharding or x.sharding.is_equivalent_to(y.sharding, x.ndim))
        for x, y in pairs
    )


def split_cache(cache: KVCache, mesh: Mesh) -> list[KVCache]:
    """The inverse of `join_caches`: the parts of this process's shards, in the same memory."""
    places = [(devices, shard_sharding(devices)) for devices in shard_devices(mesh)]
    parts: list[list[jax.Array]] = [[] for _ in places]
    for array in jax.tree.leaves(cache):
        on = {piece.device: piece.data for piece in array.addressable_shards}
        for part, (devices, sharding) in zip(parts, places, strict=True):
            if len(devices) == 1:
                part.append(on[devices[0]])
            else:
                pieces = [on[device] for device in devices]
                part.append(jax.make_array_from_single_device_arrays(pieces[0].shape, sharding, pieces))
    structure = jax.tree.structure(cache)
    return [jax.tree.unflatten(structure, part) for part in parts]
