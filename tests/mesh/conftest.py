"""A small model on one device, and spread over 2 and 4. `tests/integration/test_mesh.py` runs these tests on CPUs."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from small_model import SMALL

from dsv4_jax import KVCacheManager, build_schedule
from dsv4_jax.cache.sharded_manager import ShardedKVCacheManager
from dsv4_jax.decode import DecodeLoop
from dsv4_jax.model.sharding import shard_model
from dsv4_jax.model.transformer import DSV4Model

DEVICES = 4
CONFIG = SMALL.replace(num_hidden_layers=2, compress_ratios=(4, 6), n_routed_experts=8, num_experts_per_tok=2)
# One size for all tests, so that few programs are compiled: two requests of 72 tokens need 12 blocks of a shard.
SIZES = {
    "max_concurrent_requests": 2, "num_blocks_per_csa_layer": 8, "num_blocks_per_hca_layer": 8,
    "max_context_len": 96, "cache_dtype": "fp32",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    if jax.device_count() < DEVICES:
        for item in items:
            if "tests/mesh/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=f"needs {DEVICES} devices"))


@pytest.fixture
def config():
    return CONFIG


def make_mesh(shape):
    """A number of devices along "data", or a pair of numbers along "data" and "model"."""
    if isinstance(shape, int):
        return Mesh(np.array(jax.devices()[:shape]), ("data",))
    return Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))


@pytest.fixture
def mesh():
    """`make_mesh`."""
    return make_mesh


@pytest.fixture(scope="session")
def model():
    """model(shape): spread over a mesh as `make_mesh` makes it; 0: on one device, without a mesh."""

    @cache
    def model(n):
        if n:
            return shard_model(model(0), make_mesh(n))
        plain = DSV4Model(CONFIG, rngs=nnx.Rngs(2))
        plain.head.weight[...] = plain.head.weight[...] * 2
        return plain

    return model


@pytest.fixture(scope="session")
def make_manager():
    """make_manager(shape, ...): a manager over a mesh; 0: of one device."""

    def make_manager(n, **options):
        options = {**SIZES, **options}
        if not n:
            return KVCacheManager(CONFIG, build_schedule(CONFIG), **options)
        return ShardedKVCacheManager(CONFIG, build_schedule(CONFIG), mesh=make_mesh(n), **options)

    return make_manager


@pytest.fixture(scope="session")
def make_loop(model, make_manager):
    """make_loop(shape, ...): a loop over a mesh; options of its manager as `cache`."""

    def make_loop(n, cache=None, **options):
        manager = make_manager(n, **(cache or {}))
        options = {"prefill_chunk": 8, "decode_chunk": 4, "return_logits": True, **options}
        return DecodeLoop(model(n), manager, **options)

    return make_loop


@pytest.fixture(scope="session")
def alone(make_loop):
    """alone(ask) -> tokens and logits that it gets on one device, by itself."""
    loop, known = make_loop(0), {}

    def alone(ask):
        if ask not in known:
            number = ask.submit(loop)
            events = [event for event in loop if event.request == number and event.tokens]
            known[ask] = [t for e in events for t in e.tokens], np.concatenate([e.logits for e in events])
        return known[ask]

    return alone
