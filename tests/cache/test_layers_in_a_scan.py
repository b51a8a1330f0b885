"""Layers whose index is traced, as `lax.scan` over layers of one kind has it: the same bits, in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CacheGeometry, KVCacheManager, LayerCacheHandle
from dsv4_jax.ops import dispatch
from dsv4_jax.ops.read.attend import RawQuery
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import CompressorWeights, Projections

GEOMETRY = CacheGeometry(
    layers=("swa", "csa", "hca", "swa", "csa", "hca"), head_dim=96, rope_dim=32, window=8, index_head_dim=32,
    csa_ratio=4, hca_ratio=6,
)  # fmt: skip
HEADS, TOP_K = 2, 2
RELEASED = CacheGeometry(  # what native kernels take, to store and to read
    layers=GEOMETRY.layers, head_dim=512, rope_dim=64, window=128, index_head_dim=128, csa_ratio=4, hca_ratio=128
)
FIRST = {"swa": 0, "csa": 1, "hca": 2}


def held(cache):
    """All but which steps ran: each plan has a number of its own."""
    return cache.state, cache.paged, cache.block_table


def make(geometry=GEOMETRY, max_context_len=48, **options):
    return KVCacheManager.create(geometry, max_concurrent_requests=3, max_context_len=max_context_len, **options)


def weights(ratio, dim, lanes, pairs):
    return CompressorWeights(jnp.ones((ratio, lanes * dim)), jnp.ones(dim), jnp.linspace(1, 0.1, pairs))


def layer(handle, x):
    """All that a layer does with its cache; x (T, 2 * head_dim) stands for whatever a model would project."""
    schema, tokens = handle.schema, x.shape[0]
    kind, dim, wide, pairs = schema.kind, schema.head_dim, 2 * schema.index_head_dim, schema.rope_dim // 2
    cos, sin = jnp.full((tokens, pairs), 0.6), jnp.full((tokens, pairs), 0.8)
    indexer, compressor = None, None
    if kind == "csa":
        indexer = Projections(x[:, :wide], x[:, wide : 2 * wide], weights(4, schema.index_head_dim, 2, pairs))
        compressor = Projections(x, x + 1, weights(4, dim, 2, pairs))
    elif kind == "hca":
        compressor = Projections(x[:, :dim], x[:, dim:], weights(schema.compress_ratio, dim, 1, pairs))
    fresh, selected = None, None
    if handle.plan.one_token_per_slot:
        handle = handle.write_layer(RawWindow(x[:, :dim], jnp.ones(dim), cos, sin), compressor, indexer)
    else:
        handle = handle if indexer is None else handle.write_indexer(*indexer)
        handle = handle if compressor is None else handle.write_compressed(*compressor)
        fresh = x[:, :dim]
    if kind == "csa":
        selected = handle.select(x[:, :wide].reshape(tokens, 2, -1), x[:, :2], TOP_K, raw=(cos, sin))
    q = x.reshape(tokens, HEADS, dim)
    out = handle.attend(q, jnp.zeros(HEADS), selected=selected, fresh=fresh, raw=RawQuery(cos, sin, 1e-6))
    if kind == "csa":
        out = out + jnp.sum(handle.read_indexer_view().keys) * 0.01
    if kind != "swa":
        out = out + jnp.sum(handle.read_classical_view(selected).kv) * 0.01
    if fresh is not None:
        handle = handle.write_swa(fresh, after=out)
    out = out + jnp.sum(handle.read_swa_view().kv) * 0.01
    return handle.cache, out.reshape(x.shape)


@jax.jit
def one_by_one(cache, plan, x):
    cache, outs = cache.with_blocks(plan.new_blocks), []
    for kind, first in FIRST.items():
        for index in range(first, len(GEOMETRY.layers), 3):
            cache, out = layer(LayerCacheHandle(cache, plan, index), x)
            outs.append((kind, out))
    return cache, {kind: jnp.stack([out for k, out in outs if k == kind]) for kind in FIRST}


def scanned(cache, plan, x):
    cache, outs = cache.with_blocks(plan.new_blocks), {}
    for kind, first in FIRST.items():
        cache, outs[kind] = jax.lax.scan(
            lambda cache, index, kind=kind: layer(LayerCacheHandle(cache, plan, index, kind=kind), x),
            cache,
            jnp.arange(first, len(GEOMETRY.layers), 3),
        )
    return cache, outs


in_scan = jax.jit(scanned, donate_argnums=0)


def random(rng, tokens, dim=96):
    return rng.normal(size=(tokens, 2 * dim)).astype(np.float32)


def compare_scan(draws, chunk, same, **options):
    """Steps of two requests, the first of `chunk`, then decode steps; one layer after the other, and in scans."""
    results = []
    lengths = [chunk[0].count(i) for i in (0, 1)]
    for step in (one_by_one, in_scan):
        manager, outs = make(**options), []
        slots = a, b = manager.admit_request(), manager.admit_request()
        first = [-1 if i < 0 else slots[i] for i in chunk[0]], chunk[1]
        steps = (first, ([b, -1, a], [lengths[1], 0, lengths[0]]), ([a, b, -1], [lengths[0] + 1, lengths[1] + 1, 0]))
        for (where, positions), x in zip(steps, draws, strict=True):
            manager.cache, out = step(manager.cache, manager.plan_step(where, positions), x)
            outs.append(out)
        manager.check()
        results.append((manager.cache, outs))
    assert same(held(results[0][0]), held(results[1][0]))
    for one, other in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # sums of another program


def test_a_scan_over_layers_stores_and_reads_the_same_bits(rng, same):
    with jax.default_device(jax.devices("cpu")[0]):  # on a GPU this geometry has no native form
        chunk = [0] * 9 + [1] * 4 + [-1], [*range(9), *range(4), 0]
        compare_scan([random(rng, 14), *(random(rng, 3) for _ in range(2))], chunk, same)


@pytest.mark.gpu
def test_a_scan_over_layers_is_the_same_with_kernels(rng, same):
    chunk = [0] * 140 + [1] * 4, [*range(140), *range(4)]
    draws = [random(rng, 144, 512), *(random(rng, 3, 512) for _ in range(2))]
    compare_scan(draws, chunk, same, geometry=RELEASED, max_context_len=256)


@pytest.mark.skipif(
    "cpu" not in dispatch.available(), reason="XLA:CPU copies bfloat16 arrays; the native library avoids it"
)
def test_a_scan_over_layers_updates_a_donated_cache_in_place():
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    plan = manager.plan_step([b, -1, a], [0, 0, 0])
    compiled = in_scan.lower(manager.cache, plan, jnp.ones((3, 192))).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == manager.memory_bytes()
    leaves = [*jax.tree.leaves(manager.cache.state), *jax.tree.leaves(manager.cache.paged)]
    shapes = {",".join(map(str, x.shape)) for x in leaves}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert not shapes & set(copied)


def test_an_index_of_another_kind_or_beyond_the_layers_writes_nothing(rng, same):
    manager = make()
    plan = manager.plan_step([manager.admit_request()], [0])

    @jax.jit
    def write(cache, index):
        handle = LayerCacheHandle(cache, plan, index, kind="csa").write_swa(jnp.ones((1, 96)))
        return handle.cache, handle.read_swa_view()

    for index in (0, 2, -1, 6, 1000):
        cache, view = write(manager.cache, index)
        assert same(held(cache), held(manager.cache))
        assert not view.valid.any()
    assert not same(held(write(manager.cache, 4)[0]), held(manager.cache))


def test_a_handle_with_a_traced_index_is_a_pytree():
    manager = make()
    plan = manager.plan_step([manager.admit_request()], [0])

    @jax.jit
    def write(cache, index):
        write = jax.checkpoint(lambda handle: handle.write_swa(jnp.ones((1, 96))))
        return write(LayerCacheHandle(cache, plan, index, kind="swa"))

    handle = write(manager.cache, 3)
    assert int(handle.layer_idx) == 3
    assert handle.cache.state["swa"].swa_pos[1, 0, 0] == 0
    assert jax.tree.structure(LayerCacheHandle(manager.cache, plan, 0)) != jax.tree.structure(handle)


def test_layers_that_cannot_be_are_one_sentence():
    manager = make()
    plan = manager.plan_step([manager.admit_request()], [0])
    for index, words in (
        (6, "layer_idx is 6, but the cache has layers 0 to 5"), (-7, "layer_idx is -7"), ("0", "expected an integer"),
        (1.0, "layer_idx is 1.0, expected an integer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            LayerCacheHandle(manager.cache, plan, index)
    with pytest.raises(ValueError, match=r"layer 1: kind is 'hca', expected one of csa"):
        LayerCacheHandle(manager.cache, plan, 1, kind="hca")
    for index, words in (
        (jnp.int32(0), r"\(traced, of kind None\): kind is None, expected one of csa, hca, swa"),
        (jnp.zeros(2, jnp.int32), r"layer_idx is int32 \(2,\), expected an integer \(\)"),
        (jnp.float32(0), r"layer_idx is float32 \(\), expected an integer"),
    ):
        with pytest.raises(ValueError, match=words):
            jax.jit(lambda index: LayerCacheHandle(manager.cache, plan, index).read_swa_view())(index)
