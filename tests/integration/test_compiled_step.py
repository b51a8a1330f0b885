"""One decode step of V4-Flash's 43-layer cache, as compiled: in place, and no more memory than one layer reads."""

import collections
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DSV4Config, KVCacheManager, build_schedule
from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.ops import dispatch
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import CompressorWeights, Projections

pytestmark = pytest.mark.optimised

# A batch unlike the heads and the layers of a kind, so that a shape tells whose array it is.
BATCH, CONTEXT, HEADS, TOP_K = 3, 512, 2, 32
CONFIG = DSV4Config.flash()
SCHEDULE = build_schedule(CONFIG)


def weights(ratio, dim, lanes):
    return CompressorWeights(jnp.zeros((ratio, lanes * dim)), jnp.ones(dim), jnp.ones(32))


def write(handle, kind, x, at_once):
    """At once, as the model does it, or part by part."""
    indexer = (x[:, :256], x[:, 256:512], weights(4, 128, 2)) if kind == "CSA" else None
    compressor = {
        "CSA": (x, x, weights(4, 512, 2)),
        "HCA": (x[:, :512], x[:, 512:], weights(128, 512, 1)),
    }.get(kind)
    window = RawWindow(x[:, :512], jnp.ones(512), jnp.ones((BATCH, 32)), jnp.zeros((BATCH, 32)))
    if at_once:
        return handle.write_layer(window, compressor and Projections(*compressor), indexer and Projections(*indexer))
    handle = handle if indexer is None else handle.write_indexer(*indexer)
    handle = handle if compressor is None else handle.write_compressed(*compressor)
    return handle.write_swa(x[:, :512])


def layer(handle, kind, x, at_once):
    """What a layer does with its cache; x (T, 1024) stands for all that a model would project."""
    handle, selected = write(handle, kind, x, at_once), None
    if kind == "CSA":
        selected = handle.select(x[:, :256].reshape(-1, 2, 128), x[:, :2], TOP_K)
    q = jnp.stack([x[:, :512], x[:, 512:]], axis=1)
    out = handle.attend(q, jnp.zeros(HEADS), selected=selected, scale=0.04)
    return handle, x + 0.1 * out.reshape(x.shape)


def step(cache, plan, x, at_once=lambda layer: layer // 2 % 2 == 1):
    cache = cache.with_blocks(plan.new_blocks)
    for spec in SCHEDULE:
        at = spec.layer_idx
        handle, x = layer(LayerCacheHandle(cache, plan, at), spec.attn.name, x, at_once(at))
        cache = handle.cache
    return cache, x


@pytest.fixture
def manager():
    return KVCacheManager(
        CONFIG,
        SCHEDULE,
        max_concurrent_requests=BATCH,
        num_blocks_per_csa_layer=BATCH * CONTEXT // 128,
        num_blocks_per_hca_layer=BATCH * CONTEXT // 128,
        max_context_len=CONTEXT,
    )


@pytest.fixture
def slots(manager):
    return [manager.admit_request() for _ in range(BATCH)]


native = pytest.mark.skipif(
    "cpu" not in dispatch.available(), reason="XLA:CPU copies bfloat16 arrays; the native library avoids it"
)


@native
def test_native_calls_of_a_decode_step(manager, slots):
    """write_layer and attend in each layer, select in those with an indexer; and nothing is copied."""
    plan = manager.plan_step(slots, [0] * BATCH)
    program = jax.jit(partial(step, at_once=lambda layer: True), donate_argnums=0)
    compiled = program.lower(manager.cache, plan, jnp.ones((BATCH, 1024))).compile()
    calls = collections.Counter(re.findall(r'custom_call_target="dsv4_(\w+)"', compiled.as_text()))
    assert calls == {"append_swa_fused": 2, "write_layer": 41, "select": 21, "attend": 43}
    assert calls.total() == 107
    assert compiled.memory_analysis().alias_size_in_bytes == manager.memory_bytes()


@native
def test_decode_step_of_43_layers(manager, slots):
    plan = manager.plan_step(slots, [0] * BATCH)
    x = jnp.ones((BATCH, 1024))
    compiled = jax.jit(step, donate_argnums=0).lower(manager.cache, plan, x).compile()

    memory = compiled.memory_analysis()
    assert len(SCHEDULE) == 43
    assert memory.alias_size_in_bytes == manager.memory_bytes()

    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(manager.cache)}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert not shapes & set(copied)

    # Attention reads what is stored: not even one layer's window is there in float32, keys and all else included.
    assert memory.temp_size_in_bytes < BATCH * 128 * CONFIG.head_dim * 4

    # And it runs: the cache goes in and comes out of the same program for another step.
    manager.cache, x = compiled(manager.cache, plan, x)
    manager.cache, x = compiled(manager.cache, manager.plan_step(slots, [1] * BATCH), x)
    assert np.isfinite(x).all()
    assert np.asarray(manager.state_pools[42].swa_head).tolist() == [2] * BATCH
