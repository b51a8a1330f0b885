"""Steps without tokens and pools without blocks: nothing is written, everything can be read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.handle import LayerCacheHandle

CSA, HCA = 1, 2


def step(weights, cache, plan, x):
    """What a CSA and an HCA layer write and read; x (T, 1024)."""
    cache = cache.with_blocks(plan.new_blocks)
    handle = LayerCacheHandle(cache, plan, CSA).write_indexer(x[:, :256], x[:, :256], weights(4, 128, 2))
    handle = handle.write_compressed(x, x, weights(4, 512, 2))
    window = handle.read_swa_view(x[:, :512])
    selected = jnp.zeros((x.shape[0], 5), jnp.int32)
    read = [window, handle.read_indexer_view(), handle.read_classical_view(), handle.read_classical_view(selected)]
    cache = handle.write_swa(x[:, :512], after=window.kv).cache
    handle = LayerCacheHandle(cache, plan, HCA).write_compressed(x[:, :512], x[:, :512], weights(128, 512, 1))
    return [*read, handle.read_classical_view(), handle.read_swa_view()], handle.cache


@pytest.mark.parametrize("cache_dtype", ["fp8_ue8m0", "fp32"])
@pytest.mark.parametrize(
    ("tokens", "blocks", "shape"),
    [(0, 2, {}), (0, 2, {"num_segments": 2, "width": 3}), (3, 0, {}), (3, 0, {"num_segments": 2, "width": 3})],
)
def test_every_view_has_its_shape(make, weights, tokens, blocks, shape, cache_dtype):
    manager = make(num_blocks_per_csa_layer=blocks, num_blocks_per_hca_layer=blocks, cache_dtype=cache_dtype)
    plan = manager.plan_step([-1] * tokens, [0] * tokens, **shape)
    x = jnp.zeros((tokens, 1024))
    views, _ = jax.eval_shape(lambda *a: step(weights, *a), manager.cache, plan, x)
    segments = shape.get("num_segments", tokens)
    window, keys, entries, selected, _, _ = views
    assert keys.keys.shape == (segments, 64, 128)
    assert entries.kv.shape == (segments, 64, 512)
    assert selected.kv.shape == (tokens, 5, 512)
    assert window.valid.shape == (tokens, window.kv.shape[1])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 2), (3, 0)])
def test_nothing_is_written(make, weights, same, tokens, blocks):
    manager = make(num_blocks_per_csa_layer=blocks, num_blocks_per_hca_layer=blocks, cache_dtype="fp8_ue8m0")
    plan = manager.plan_step([-1] * tokens, [0] * tokens, num_segments=2, width=3)
    x = jnp.full((tokens, 1024), jnp.nan)
    views, cache = jax.jit(lambda *a: step(weights, *a))(manager.cache, plan, x)
    assert same(cache, replace(manager.cache, ran=cache.ran))  # that the step ran is all there is to see
    assert not any(np.asarray(view.valid).any() for view in views)
