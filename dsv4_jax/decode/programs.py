"""Where a loop's steps run: on one device, or on all devices of a mesh at once."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from inspect import unwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..cache.kv_cache import KVCache
from ..cache.plan import StepPlan
from ..cache.sharding import DATA, cache_specs, shard_devices
from ..model.transformer import DSV4Model
from .steps import (
    WITH_LOGITS,
    DecodeInputs,
    DecodeProgram,
    LoopState,
    PrefillInputs,
    Structure,
    Wanted,
    decode_steps,
    prefill_step,
    split_model,
)

Array = jax.Array
Specs = tuple[PartitionSpec, ...]

OWN = PartitionSpec(DATA)
"""Of what every shard has its own part of, on the first axis."""


PROCESS_TIMEOUT_S = 300.0
"""How long a process waits for the others, in seconds: one may still compile where another has its programs."""

_END = "expected every process to go on stepping until all have finished; end them all and start again"


COMPILER_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
"""Of a loop's programs: kernels of a CUDA graph that do not need each other's results run side by side."""


class OneDevice:
    """The steps of `steps.py`, as programs of their own."""

    def __init__(self, model: DSV4Model):
        self.structure, self.weights = split_model(model)
        self.key: Any = None  # tells programs apart that differ in nothing else

    def over(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step of `steps.py` as it runs here."""
        return _here.get(step, step)

    def put(self, tree: Any) -> Any:
        """Host arrays of a call that stay on the device for the next; others go as they are."""
        return jax.device_put(tree)

    def operands(self, tree: Any) -> Any:
        """Host arrays as a call takes them."""
        return tree

    def fetch(self, array: Array) -> np.ndarray:
        """A result on the host."""
        return np.asarray(array)

    def agree(self, wishes: Sequence[int]) -> list[int]:
        """The largest of what each process wishes, number by number."""
        return list(wishes)

    def shapes(self, cache: KVCache) -> KVCache:
        """What `compile` takes for a cache."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)

    def compile(self, step: partial, *operands: Any) -> Any:
        """Compiles a step for operands of these shapes."""
        jitted: Any = step.func
        return jitted.lower(*operands, **step.keywords).compile()


class OverMesh(OneDevice):
    """The same steps inside one `jax.shard_map`: every device runs them on its own tokens, plan and cache.

    Host arrays are those of this process's shards, one after the other.
    """

    def __init__(self, model: DSV4Model, mesh: Mesh, process_timeout_s: float = PROCESS_TIMEOUT_S):
        super().__init__(model)
        self._process_timeout_s = process_timeout_s
        specs: Specs = tuple(weight.sharding.spec for weight in self.weights)  # type: ignore[attr-defined]
        self._steps: dict[Any, Callable[..., Any]] = {
            prefill_step: partial(_prefill_over_mesh, spread=Spread(mesh, specs)),
            decode_steps: partial(_decode_over_mesh, spread=Spread(mesh, specs)),
        }
        self.key = mesh
        self._own = NamedSharding(mesh, OWN)

    def over(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step of `steps.py` on every shard."""
        return self._steps[step]

    def put(self, tree: Any) -> Any:
        """Host arrays, each shard's part on its device."""
        if self._own.is_fully_addressable:
            return jax.device_put(tree, self._own)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._own, np.asarray(x)), tree)

    def operands(self, tree: Any) -> Any:
        """As `put`."""
        return self.put(tree)

    def shapes(self, cache: KVCache) -> KVCache:
        """What `compile` takes for a cache."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache)

    def agree(self, wishes: Sequence[int]) -> list[int]:
        """The largest of what each process wishes, number by number; every process asks at the same time."""
        if self._own.is_fully_addressable:
            return list(wishes)
        own = np.tile(np.array(wishes, np.int32), (len(shard_devices(self.key)), 1))
        return np.asarray(self._when_ready(_largest(self.put(own), mesh=self.key))).tolist()

    def fetch(self, array: Array) -> np.ndarray:
        """What this process's shards have of a result, on the host."""
        if array.is_fully_addressable:
            return np.asarray(array)
        self._when_ready(array)
        axis = array.sharding.spec.index(DATA)  # type: ignore[attr-defined]
        parts = {piece.index[axis].start or 0: piece.data for piece in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=axis)

    def _when_ready(self, array: Array) -> Array:
        """Waits for what all processes compute together; RuntimeError where one of them does not take part."""
        begun, most = time.monotonic(), self._process_timeout_s
        while not array.is_ready():  # type: ignore[attr-defined]
            if time.monotonic() - begun > most:
                raise RuntimeError(f"another process took no part in this call for {most:g} s: {_END}")
            time.sleep(1e-4)
        try:
            return array.block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"a call of several processes failed, one may have ended ({error}): {_END}") from error


@partial(jax.jit, static_argnames="mesh")
def _largest(wishes: Array, *, mesh: Mesh) -> Array:
    """wishes (shards, n) int32, of every shard -> the largest (n,)."""
    return jax.shard_map(
        lambda own: jax.lax.pmax(jnp.max(own, axis=0), mesh.axis_names),
        mesh=mesh,
        in_specs=OWN,
        out_specs=PartitionSpec(),
        check_vma=False,
    )(wishes)


# `jax.jit` refuses options in what another program calls, so the steps themselves have none.
_here: dict[Callable[..., Any], Callable[..., Any]] = {
    step: jax.jit(
        unwrap(step), static_argnames=("structure", own), donate_argnames="cache", compiler_options=COMPILER_OPTIONS
    )
    for step, own in ((prefill_step, "wanted"), (decode_steps, "program"))
}


class Spread(NamedTuple):
    """Where the weights of a model lie."""

    mesh: Mesh
    specs: Specs


@partial(
    jax.jit,
    static_argnames=("structure", "spread", "wanted"),
    donate_argnames="cache",
    compiler_options=COMPILER_OPTIONS,
)
def _prefill_over_mesh(
    structure: Structure,
    weights: list[Array],
    cache: KVCache,
    plan: StepPlan,
    given: PrefillInputs,
    *,
    spread: Spread,
    wanted: Wanted = WITH_LOGITS,
) -> tuple[list[Array], list[Array]]:
    """`prefill_step` on every shard: T tokens, N rows each; arrays have those of all shards, one after the other."""
    caches = cache_specs(cache)

    def local(*operands: Any) -> tuple[list[Array], list[Array]]:
        return prefill_step(structure, *operands, wanted=wanted)

    inside = jax.shard_map(
        local,
        mesh=spread.mesh,
        in_specs=(list(spread.specs), caches, OWN, OWN),
        out_specs=(OWN, jax.tree.leaves(caches)),
        check_vma=False,
    )
    return inside(weights, cache, plan, given)


@partial(
    jax.jit,
    static_argnames=("structure", "spread", "program"),
    donate_argnames="cache",
    compiler_options=COMPILER_OPTIONS,
)
def _decode_over_mesh(
    structure: Structure,
    weights: list[Array],
    cache: KVCache,
    loop: LoopState,
    given: DecodeInputs,
    *,
    spread: Spread,
    program: DecodeProgram,
) -> tuple[list[Array], list[Array], list[Array]]:
    """`decode_steps` on every shard, of R slots each; arrays have those of all shards, one after the other."""
    caches = cache_specs(cache)

    def local(*operands: Any) -> tuple[list[Array], list[Array], list[Array]]:
        return decode_steps(structure, *operands, program=program)

    inside = jax.shard_map(
        local,
        mesh=spread.mesh,
        in_specs=(list(spread.specs), caches, OWN, OWN),
        out_specs=(PartitionSpec(None, DATA), OWN, jax.tree.leaves(caches)),
        check_vma=False,
    )
    return inside(weights, cache, loop, given)
