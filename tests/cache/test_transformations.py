"""A step under JAX's transformations: exported to a file, and mapped over several caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CacheGeometry, KVCacheManager, LayerCacheHandle, native_calls
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import CompressorWeights, Projections

SIZES = {"head_dim": 96, "rope_dim": 32, "window": 8, "index_head_dim": 32, "csa_ratio": 4, "hca_ratio": 6}


def make(*layers, **options):
    geometry = CacheGeometry(layers=layers, **SIZES)
    return KVCacheManager.create(geometry, max_concurrent_requests=2, max_context_len=24, **options)


def step(cache, plan, x):
    """A CSA layer, and an HCA layer where there is one, write a token of each slot and attend; x (T, 192)."""
    cache = cache.with_blocks(plan.new_blocks)
    window = RawWindow(x[:, :96], jnp.ones(96), jnp.ones((x.shape[0], 16)), jnp.zeros((x.shape[0], 16)))
    weights = [CompressorWeights(jnp.ones(shape), jnp.ones(shape[1] // lanes), jnp.ones(16)) for shape, lanes in (
        ((4, 192), 2), ((4, 64), 2), ((6, 96), 1),
    )]  # fmt: skip
    csa = LayerCacheHandle(cache, plan, 0).write_layer(
        window, Projections(x, x, weights[0]), Projections(x[:, :64], x[:, 64:128], weights[1])
    )
    out = csa.attend(x.reshape(-1, 2, 96), jnp.zeros(2))
    if len(cache.schemas) == 1:
        return csa.cache, out
    hca = LayerCacheHandle(csa.cache, plan, 1).write_layer(window, Projections(x[:, :96], x[:, 96:], weights[2]))
    return hca.cache, out + hca.attend(x.reshape(-1, 2, 96), jnp.zeros(2))


def test_a_step_is_exported_and_read_again(same, rng):
    pytest.importorskip("flatbuffers")
    from jax import export

    manager = make("csa", "hca", hca_tail="running", cache_dtype="fp8_ue8m0")
    plan = manager.plan_step([manager.admit_request(), manager.admit_request()], [0, 0])
    x = rng.normal(size=(2, 192)).astype(np.float32)
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in native_calls()]
    stored = export.export(jax.jit(step), disabled_checks=allowed)(manager.cache, plan, x).serialize()
    read = export.deserialize(bytearray(stored))
    assert read.in_tree == jax.tree.structure(((manager.cache, plan, x), {}))
    expected = jax.jit(step)(manager.cache, plan, x)
    assert same(jax.jit(read.call)(manager.cache, plan, x), expected)


def test_a_step_is_mapped_over_stacked_caches(rng):
    """As many caches as the batch has, one plan: what each of them gets alone."""
    managers = [make("csa"), make("csa")]
    xs = rng.normal(size=(5, 2, 2, 192)).astype(np.float32)
    alone, mapped = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m.cache for m in managers))
    slots = [[m.admit_request(), m.admit_request()] for m in managers]
    for position in range(5):  # a window closes
        plans = [m.plan_step(s, [position] * 2) for m, s in zip(managers, slots, strict=True)]
        outs = []
        for m, plan, x in zip(managers, plans, xs[position], strict=True):
            m.cache, out = alone(m.cache, plan, x)
            outs.append(out)
        stacked, out = mapped(stacked, plans[0], xs[position])
        np.testing.assert_allclose(out, np.stack(outs), rtol=1e-5, atol=1e-5)
    held = [(c.state, c.paged, c.block_table) for c in (stacked, *(m.cache for m in managers))]  # plans have numbers
    for one, *others in zip(*map(jax.tree.leaves, held), strict=True):
        if one.dtype == jnp.float32:  # tails hold sums that another program may round otherwise
            np.testing.assert_allclose(one, np.stack(others), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, np.stack(others))
