"""Random weights in the released form, made on the device: what a model of any size takes and costs, without a file."""

import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ..cache.counts import is_integer
from ..cache.sharding import MODEL, no_context_mesh
from .config import DSV4Config
from .files.checkpoint import float_type
from .files.released_form import released_bytes, released_type
from .files.tensor_names import expected_tensors, keeps_float32, scale_name
from .files.weight_formats import scale_shape
from .pretrained import model_of
from .sharding import check_fit, check_shards, weight_sharding
from .transformer import DSV4Model

Array = jax.Array

_EXPERT = re.compile(r"(.*\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_E8M0_BIAS = 127
_FP8_SPREAD = 64.0
"""Standard deviation of E4M3 codes: seven of them are the format's largest value."""
_FP4_RMS = 2.93
"""Root mean square of E2M1's values, each as likely as the others."""


def random_model(config: DSV4Config, *, seed: int = 0, dtype: DTypeLike = jnp.bfloat16, mesh: Any = None) -> DSV4Model:
    """A model with random weights, held as `from_pretrained` holds a released checkpoint.

    Projections are FP8 codes and routed experts FP4 codes with their scales, norms and the like float32, everything
    else bfloat16; all of a size that keeps activations in range. They are made on the device, a tensor at a time: no
    memory but theirs is taken, on the host none. The same seed gives the same weights.

    Args:
      config: of the model; what is FP4 needs rows of a multiple of 32.
      seed: of the random numbers.
      dtype: what the model computes in, float32 or bfloat16.
      mesh: a `jax.sharding.Mesh` with an axis "data": every device makes its part of the weights, as `shard_model`
        spreads them; the weights are the same.

    Returns:
      The model, its weights on the default device, or on the mesh.

    Raises:
      ValueError: sizes that the released form cannot hold, weights that do not fit, a mesh over which the model cannot
        be spread, another dtype, or what is no configuration or no seed.
    """
    if not isinstance(config, DSV4Config):
        raise ValueError(f"config is {config!r:.80}: expected a DSV4Config, such as DSV4Config.flash()")
    if not is_integer(seed):
        raise ValueError(f"seed is {seed!r}: expected an integer")
    dtype = float_type(dtype)
    mesh = None if mesh is None else check_shards(config, mesh)
    devices, model_devices = (1, 1) if mesh is None else (mesh.devices.size, mesh.shape.get(MODEL, 1))
    check_fit(released_bytes(config, devices, model_devices).held, "random weights", mesh)
    with no_context_mesh():
        return model_of(config, dtype, dict(_tensors(config, seed, mesh)), mesh)


def _tensors(config: DSV4Config, seed: int, mesh: Mesh | None) -> Iterator[tuple[str, Array]]:
    """Every array of the model and its canonical name; experts stacked, codes before their scales."""

    def make(function: Callable[..., Array], name: str, *arguments: Any, **static: Any) -> Array:
        if mesh is None:
            return function(*arguments, **static)
        return _on(function, tuple(static), weight_sharding(name, static["shape"], mesh))(*arguments, **static)

    for name, shape in expected_tensors(config).items():
        form = released_type(name)
        lead: tuple[int, ...] = ()
        if expert := _EXPERT.fullmatch(name):
            if int(expert[2]):
                continue
            lead, name = (config.n_routed_experts,), f"{expert[1]}.{expert[3]}"
        # A number for each name, whatever else the model has.
        own = np.uint32(zlib.crc32(name.encode(), seed % 2**32))
        if form in ("fp8", "fp4"):
            rows, columns = shape
            scales = (*lead, *scale_shape(form, (rows, columns)))
            codes = (*lead, rows, columns // 2 if form == "fp4" else columns)
            exponent = round(math.log2(columns**-0.5 / (_FP4_RMS if form == "fp4" else _FP8_SPREAD)))
            yield name, make(_codes, name, own, form=form, shape=codes)
            scale = f"{name}_scale" if lead else scale_name(name)
            yield scale, make(_scales, scale, own, np.int32(exponent), shape=scales)
        elif name.endswith(".tid2eid"):
            yield name, make(_table, name, own, shape=shape, experts=config.n_routed_experts)
        else:
            mean, spread = map(np.float32, _distribution(name, shape))
            yield name, make(_floats, name, own, mean, spread, shape=shape, bfloat16=not keeps_float32(name))


@functools.cache
def _on(function: Any, static: tuple[str, ...], sharding: NamedSharding) -> Callable[..., Array]:
    """The jitted function, its result on a mesh, each part made where it lies."""
    return jax.jit(function.__wrapped__, static_argnames=static, out_shardings=sharding)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor that is not quantised."""
    if name.endswith(("norm.weight", "_scale")):
        return 1.0, 0.1
    if name == "embed.weight" or name.endswith("_fn"):
        return 0.0, 0.02
    if len(shape) == 1 or name.endswith(".ape"):  # sinks, biases
        return 0.0, 0.1
    return 0.0, shape[-1] ** -0.5


def _bits(seed: Array, shape: tuple[int, ...]) -> Array:
    """Random uint32: hashes of the elements' places: they fuse with what follows and compile sooner than jax.random."""
    place = jnp.zeros(shape, jnp.uint32) + seed
    for axis in range(len(shape)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(math.prod(shape[axis + 1 :]))
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 0x9E3779B9)):
        place = (place ^ (place >> np.uint32(shift))) * np.uint32(factor)
    return place ^ (place >> np.uint32(15))


def _bell(seed: Array, shape: tuple[int, ...]) -> Array:
    """Float32 of mean 0 and standard deviation 1, the sum of four bytes: nearly normal, within 3.5."""
    bits = _bits(seed, shape)
    parts = [(bits >> np.uint32(shift)) & np.uint32(255) for shift in (0, 8, 16, 24)]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    return (total.astype(jnp.float32) - 510.0) * (3 / (256**2 - 1)) ** 0.5


@functools.partial(jax.jit, static_argnames=("form", "shape"))
def _codes(seed: Array, form: str, shape: tuple[int, ...]) -> Array:
    """E2M1 pairs, all values as likely; E4M3 of numbers around 0."""
    if form == "fp4":
        return (_bits(seed, shape) >> np.uint32(13)).astype(jnp.uint8)
    values = (_FP8_SPREAD * _bell(seed, shape)).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


@functools.partial(jax.jit, static_argnames=("shape",))
def _scales(seed: Array, exponent: Array, shape: tuple[int, ...]) -> Array:
    """E8M0 of 2^exponent, of half and of twice as much."""
    return (_bits(seed, shape) % np.uint32(3) + exponent.astype(jnp.uint32) + np.uint32(_E8M0_BIAS - 1)).astype(
        jnp.uint8
    )


@functools.partial(jax.jit, static_argnames=("shape", "bfloat16"))
def _floats(seed: Array, mean: Array, spread: Array, shape: tuple[int, ...], *, bfloat16: bool) -> Array:
    return (mean + spread * _bell(seed, shape)).astype(jnp.bfloat16 if bfloat16 else jnp.float32)


@functools.partial(jax.jit, static_argnames=("shape", "experts"))
def _table(seed: Array, shape: tuple[int, ...], experts: int) -> Array:
    """Different experts for each token: steps of random sizes from a random first one."""
    bits = _bits(seed, shape).astype(jnp.int32) & np.int32(0x7FFFFFFF)
    steps = bits % np.int32(experts // shape[1]) + np.int32(1)
    return (jnp.cumsum(steps, axis=1, dtype=jnp.int32) + bits[:, :1]) % np.int32(experts)
