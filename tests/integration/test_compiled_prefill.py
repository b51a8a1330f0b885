"""A step that brings several tokens of a slot, as compiled: `after=` keeps the cache in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CacheGeometry, CompressorWeights, KVCacheManager, LayerCacheHandle
from dsv4_jax.ops import dispatch

pytestmark = pytest.mark.optimised

# Numbers of slots, of tokens a slot brings, and of blocks unlike each other: a shape tells whose array it is.
SLOTS, WIDTH, CONTEXT = 5, 24, 1792
LAYERS = ("swa", "csa", "hca", "csa", "swa", "hca")


def weights(ratio, lanes, dim):
    return CompressorWeights(jnp.zeros((ratio, lanes * dim)), jnp.ones(dim), jnp.ones(32))


def prefill(cache, plan, x):
    """x (T, 1024) stands for all that a model would project; each layer's output is the next one's input."""
    cache = cache.with_blocks(plan.new_blocks)
    for layer_idx, kind in enumerate(LAYERS):
        handle, kv = LayerCacheHandle(cache, plan, layer_idx), x[:, :512]
        seen = 0.0
        if kind == "csa":
            handle = handle.write_indexer(x[:, :256], x[:, 256:512], weights(4, 2, 128))
            handle = handle.write_compressed(x, x, weights(4, 2, 512))
            seen = handle.read_indexer_view().valid.sum(axis=1, dtype=jnp.float32)[:, None]
        if kind == "hca":
            handle = handle.write_compressed(kv, kv, weights(128, 1, 512))
        if layer_idx % 2:
            window = handle.read_swa_view(kv)
            x = x * 0.5 + window.valid.sum(axis=1, dtype=jnp.float32)[:, None] * window.kv.mean() + seen
        else:
            x = x * 0.5 + handle.attend(x.reshape(-1, 2, 512), jnp.zeros(2), fresh=kv).reshape(x.shape) + seen
        cache = handle.write_swa(kv, after=x).cache
    return cache, x


@pytest.mark.skipif(
    "cpu" not in dispatch.available(), reason="XLA:CPU copies bfloat16 arrays; the native library avoids it"
)
def test_a_prefill_step_updates_the_cache_in_place():
    geometry = CacheGeometry(layers=LAYERS)
    manager = KVCacheManager.create(geometry, max_concurrent_requests=SLOTS, max_context_len=CONTEXT)
    slots = [manager.admit_request() for _ in range(SLOTS)]
    x = jnp.ones((SLOTS * WIDTH, 1024))

    def plan(first):
        positions = np.tile(np.arange(first, first + WIDTH), SLOTS)
        return manager.plan_step(np.repeat(slots, WIDTH), positions)

    first = plan(0)
    compiled = jax.jit(prefill, donate_argnums=0).lower(manager.cache, first, x).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == manager.memory_bytes()
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(manager.cache)}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert not shapes & set(copied)

    manager.cache, out = compiled(manager.cache, first, x)
    manager.cache, out = compiled(manager.cache, plan(WIDTH), x)
    assert np.isfinite(out).all()
    assert [manager.length(slot) for slot in slots] == [2 * WIDTH] * SLOTS
