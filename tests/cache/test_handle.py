"""What a layer writes through its handle is what it reads back, by position."""

from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import PrefixPolicy
from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.ops.formats.fp8 import dequantise_fp8, quantise_fp8
from dsv4_jax.ops.formats.record import pack_records, unpack_records
from dsv4_jax.ops.nn.rms_norm import rms_norm
from dsv4_jax.ops.nn.rope import apply_rope, rope_angles
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import Projections

SWA, CSA, HCA = 0, 1, 2

write_swa = jax.jit(LayerCacheHandle.write_swa)
write_fused = jax.jit(LayerCacheHandle.write_swa_fused)
write_layer = jax.jit(LayerCacheHandle.write_layer)
write_compressed = jax.jit(LayerCacheHandle.write_compressed)
read_window = jax.jit(LayerCacheHandle.read_swa_view)
read_entries = jax.jit(LayerCacheHandle.read_classical_view)
write_indexer = jax.jit(LayerCacheHandle.write_indexer)
read_keys = jax.jit(LayerCacheHandle.read_indexer_view)


@partial(jax.jit, static_argnums=2)
def write_entries(cache, plan, layer, kv, gate, weights):
    return LayerCacheHandle(cache.with_blocks(plan.new_blocks), plan, layer).write_compressed(kv, gate, weights)


@jax.jit
def write_parts(handle, window, compressor=None, indexer=None):
    handle = handle if indexer is None else handle.write_indexer(*indexer)
    handle = handle if compressor is None else handle.write_compressed(*compressor)
    return handle.write_swa_fused(*window)


def random(rng, *shape):
    """numpy: XLA would compile a program for every slice of it."""
    return rng.normal(size=shape).astype(np.float32)


@jax.jit
def read_back(nope):
    return dequantise_fp8(*quantise_fp8(nope))


def stored(kv):
    """kv (T, 512) as an FP8 record gives it back."""
    return np.concatenate([read_back(kv[:, :448]), kv[:, 448:].astype(jnp.bfloat16).astype(np.float32)], axis=-1)


def on_host(view):
    return type(view)(*map(np.asarray, view))


def test_window_wraps(make, rng):
    manager = make()
    slot = manager.admit_request()
    kv = random(rng, 140, 512)
    for p in range(140):
        handle = manager.acquire(SWA, [slot], [p])
        handle = write_swa(handle, kv[p : p + 1])
        manager.cache = handle.cache
    view = on_host(read_window(handle))
    assert view.kv.shape == (1, 128, 512)
    assert view.valid.all()
    assert sorted(view.positions[0].tolist()) == list(range(12, 140))
    np.testing.assert_array_equal(view.kv[0], stored(kv)[np.asarray(view.positions[0])])
    state = handle.state
    assert state.swa_head.tolist() == [140 % 128, 0]
    np.testing.assert_array_equal(state.swa_pos[slot], view.positions[0])


def test_window_before_it_is_full(make, rng):
    manager = make()
    slot = manager.admit_request()
    view = read_window(write_swa(manager.acquire(SWA, [slot], [0]), random(rng, 1, 512)))
    assert int(view.valid.sum()) == 1
    assert view.positions[0].tolist() == [0] + [-1] * 127


@pytest.mark.parametrize("tokens", [5, 128, 200])
def test_several_tokens_of_a_slot(make, rng, tokens):
    """Writing first is right as well: a step's first tokens see rows that its last tokens took."""
    manager = make()
    slot = manager.admit_request()
    kv = random(rng, 256, 512)
    for start, end in ((0, 56), (56, 56 + tokens)):
        handle = write_swa(manager.acquire(SWA, [slot] * (end - start), np.arange(start, end)), kv[start:end])
        manager.cache = handle.cache
    view = on_host(read_window(handle))
    expected = stored(kv)
    for t, p in enumerate(range(56, 56 + tokens)):
        seen = np.flatnonzero(view.valid[t])
        positions = view.positions[0][seen]
        assert sorted(positions) == list(range(max(0, p - 127), p + 1))
        np.testing.assert_array_equal(view.kv[0][seen], expected[positions])
    again = read_window(LayerCacheHandle(handle.cache, handle.plan, SWA))
    newest = np.asarray(again.positions[0])
    assert sorted(newest[newest >= 0]) == list(range(max(0, 56 + tokens - 128), 56 + tokens))


@jax.jit
def normed_and_rotated(raw, norm, positions):
    angles = rope_angles(positions, jnp.asarray(1e4 ** -(np.arange(32) / 32), jnp.float32))
    return angles, apply_rope(rms_norm(raw, norm, eps=1e-6), *angles)


def fused_inputs(rng, positions):
    """kv as the projection gives it, norm, cos and sin; and kv normed and rotated."""
    raw, norm = random(rng, len(positions), 512), 1 + 0.1 * random(rng, 512)
    angles, kv = normed_and_rotated(raw, norm, np.array(positions, np.int32))
    return (raw, norm, *angles), kv


def test_the_fused_write_is_the_plain_one_of_what_is_normed_and_rotated(make, rng):
    """Both in a decode step and in one that brings several tokens, which reads first or is kept what it needs."""
    manager = make(cache_dtype="fp32")  # stored exactly
    slots = [manager.admit_request(), manager.admit_request()]
    for positions in (np.arange(10), np.arange(10, 11)):
        inputs, kv = fused_inputs(rng, np.tile(positions, 2))
        handle = manager.acquire(SWA, np.repeat(slots, len(positions)), np.tile(positions, 2))
        fused, plain = write_fused(handle, *inputs), write_swa(handle, kv)
        assert (fused.pending is None) == (len(positions) == 1)
        chex.assert_trees_all_close(fused, plain, rtol=1e-5, atol=1e-6)
        manager.cache = fused.cache


def layer_inputs(rng, weights, layer, positions):
    """What a layer's write_layer takes, and write_swa of the same window."""
    inputs, kv = fused_inputs(rng, positions)

    def of(ratio, dim, lanes):
        return Projections(*(random(rng, len(positions), lanes * dim) for _ in range(2)), weights(ratio, dim, lanes))

    parts = {SWA: (), CSA: (of(4, 512, 2), of(4, 128, 2)), HCA: (of(128, 512, 1),)}[layer]
    return (RawWindow(*inputs), *parts), kv


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["swa", "csa", "hca"])
def test_a_layer_writes_at_once_what_its_parts_write(make, rng, weights, layer, same):
    manager = make()
    slots = [manager.admit_request(), manager.admit_request()]
    for slot in slots * 2 if layer != SWA else ():
        manager.allocate_block(layer, slot)
    for start in (126, 127, 3):
        positions = [start, start + 1]
        inputs, _ = layer_inputs(rng, weights, layer, positions)
        handle = manager.acquire(layer, [*slots], positions)
        at_once, parts = write_layer(handle, *inputs), write_parts(handle, *inputs)
        assert same(at_once.cache, parts.cache)
        assert not same(at_once.cache, manager.cache)
        manager.cache = at_once.cache


def test_a_layer_takes_what_belongs_to_it(make, rng, weights):
    manager = make()
    slot = manager.admit_request()
    manager.allocate_block(CSA, slot)
    (window, compressor, indexer), _ = layer_inputs(rng, weights, CSA, [0])
    with pytest.raises(ValueError, match="layer 1 is CSA: got None for indexer, expected its projections"):
        manager.acquire(CSA, [slot], [0]).write_layer(window, compressor)
    with pytest.raises(ValueError, match="layer 0 is SWA: got projections for compressor, expected None"):
        manager.acquire(SWA, [slot], [0]).write_layer(window, compressor)
    with pytest.raises(ValueError, match=r"layer 1: gate has shape \(1, 1024\), expected \(1, 256\)"):
        manager.acquire(CSA, [slot], [0]).write_layer(window, compressor, compressor._replace(kv=indexer.kv))
    with pytest.raises(ValueError, match="several tokens of a slot, expected a decode step"):
        manager.acquire(CSA, [slot] * 2, [0, 1]).write_layer(window, compressor, indexer)


@jax.jit
def normed_and_rotated_entries(pooled, norm, inv_freq, first):
    return apply_rope(rms_norm(pooled, norm, eps=1e-6), *rope_angles(first, inv_freq))


def reference_entries(kv, gate, weights, ratio, overlap):
    """Entries of one request by the rule itself, in float64 per channel: kv, gate (n, lanes * d)."""
    kv, gate, ape = (np.asarray(x, np.float64) for x in (kv, gate, weights.ape))
    z = gate + ape[np.arange(len(kv)) % ratio]
    d = weights.norm.shape[0]
    entries = []
    for w in range(len(kv) // ratio):
        own = slice(w * ratio, (w + 1) * ratio)
        if overlap:
            rows, scores = [kv[own, d:]], [z[own, d:]]
            if w:
                before = slice((w - 1) * ratio, w * ratio)
                rows.insert(0, kv[before, :d])
                scores.insert(0, z[before, :d])
            k, s = np.concatenate(rows), np.concatenate(scores)
        else:
            k, s = kv[own], z[own]
        p = np.exp(s - s.max(axis=0))
        entries.append((p * k).sum(axis=0) / p.sum(axis=0))
    first = np.arange(len(entries), dtype=np.int32) * ratio
    pooled = np.stack(entries).astype(np.float32)
    return np.asarray(normed_and_rotated_entries(pooled, weights.norm, weights.inv_freq, first))


@pytest.mark.parametrize(("layer", "ratio", "lanes"), [(CSA, 4, 2), (HCA, 128, 1)], ids=["csa", "hca"])
@pytest.mark.parametrize("cuts", [(), (3, 4, 5, 130), (127, 128, 129)], ids=str)
def test_entries(make, rng, weights, layer, ratio, lanes, cuts):
    """Entries follow the rule, wherever the request is cut."""
    manager = make(cache_dtype="fp32")
    slot = manager.admit_request()
    n = 150
    kv, gate, w = random(rng, n, lanes * 512), random(rng, n, lanes * 512), weights(ratio, 512, lanes)
    for start, end in pairwise([0, *cuts, n]):
        rows = np.arange(start, end)
        if end - start > 1:  # padded, so that pieces of all lengths are one program
            rows = np.resize(rows, n)
        live = np.arange(len(rows)) < end - start
        plan = manager.plan_step(np.where(live, slot, -1), rows, num_segments=1, width=len(rows))
        handle = write_entries(manager.cache, plan, layer, kv[rows], gate[rows], w)
        manager.cache = handle.cache
    view = on_host(read_entries(handle))
    expected = reference_entries(kv, gate, w, ratio, layer == CSA)
    last = end - start - 1
    assert int(view.valid[last].sum()) == len(expected) == n // ratio
    assert view.positions[0].tolist()[: len(expected)] == [e * ratio for e in range(len(expected))]
    np.testing.assert_allclose(view.kv[0, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert not view.kv[0, len(expected) :].any()
    if layer == CSA:
        chosen = np.array([[3, 0, -1, 36, 37]] * len(rows), np.int32)
        picked = on_host(read_entries(handle, chosen))
        assert picked.valid[last].tolist() == [True, True, False, True, False]
        np.testing.assert_array_equal(picked.kv[last, [0, 1, 3]], view.kv[0, np.array([3, 0, 36])])


@pytest.mark.parametrize(("layer", "ratio", "lanes"), [(CSA, 4, 2), (HCA, 128, 1)], ids=["csa", "hca"])
def test_a_decode_step_may_run_twice(make, rng, weights, same, layer, ratio, lanes):
    """Without room to roll back: the newest token of a request is written again, and all that follows is the same."""
    n = 12 if layer == CSA else 2 * ratio
    kv, gate, w = random(rng, n, lanes * 512), random(rng, n, lanes * 512), weights(ratio, 512, lanes)
    ends = []
    for twice in ((), range(ratio - 1, n, ratio)):  # the tokens that close a window
        manager = make(cache_dtype="fp32")
        slot = manager.admit_request()
        for p in range(n):
            plan = manager.plan_step([slot], [p], num_segments=1, width=1)
            for _ in range(2 if p in twice else 1):
                manager.cache = write_entries(manager.cache, plan, layer, kv[p : p + 1], gate[p : p + 1], w).cache
        manager.check()
        ends.append((manager.cache.paged, manager.cache.state))
    assert same(*ends)


def test_indexer_keys(make, rng, weights):
    manager = make(indexer_dtype="fp32")
    slot = manager.admit_request()
    manager.allocate_block(CSA, slot)
    kv, gate, w = random(rng, 43, 256), random(rng, 43, 256), weights(4, 128, 2)
    handle = write_indexer(manager.acquire(CSA, [slot] * 43, np.arange(43)), kv, gate, w)
    view = on_host(read_keys(handle))
    np.testing.assert_allclose(view.keys[0, :10], reference_entries(kv, gate, w, 4, True), rtol=1e-5, atol=1e-5)
    assert view.valid[-1].tolist() == [True] * 10 + [False] * 54
    assert not handle.keys_rotated


def test_padding_writes_nothing(make, rng, weights, same):
    manager = make()
    manager.admit_request()
    for layer, ratio, lanes in ((SWA, 0, 0), (CSA, 4, 2), (HCA, 128, 1)):
        handle = manager.acquire(layer, [-1, -1], [127, 3])
        handle = write_swa(handle, random(rng, 2, 512))
        if ratio:
            x = random(rng, 2, lanes * 512)
            handle = write_compressed(handle, x, x, weights(ratio, 512, lanes))
        assert same(handle.cache, manager.cache)
        assert not np.asarray(read_window(handle).valid).any()


def test_a_missing_block_is_an_error(make, rng, weights):
    manager = make()
    slot = manager.admit_request()
    x, w = random(rng, 4, 1024), weights(4, 512, 2)
    handle = manager.acquire(CSA, [slot] * 4, np.arange(4))
    with pytest.raises(RuntimeError, match=r"call allocate_block\(1, 0\) first"):
        handle.write_compressed(x, x, w)
    manager.allocate_block(CSA, slot)
    write_compressed(manager.acquire(CSA, [slot] * 4, np.arange(4)), x, x, w)


def test_a_block_that_others_read_is_not_written(make, rng, weights):
    """After a fork, and where a prefix is kept; blocks of its own a request may write again."""
    manager = make(num_blocks_per_csa_layer=6, max_concurrent_requests=2, prefix=PrefixPolicy("full"))
    x, w = random(rng, 4, 1024), weights(4, 512, 2)
    a = manager.admit_request()
    for layer in (CSA, CSA, HCA):
        manager.allocate_block(layer, a)
    manager.advance(a, 128 + 4)
    write_compressed(manager.acquire(CSA, [a] * 4, np.arange(4)), x, x, w)
    b = manager.fork(a)
    for slot in (a, b):
        with pytest.raises(RuntimeError, match=rf"layer 1: slot {slot} brings position 4, whose block others read too"):
            write_compressed(manager.acquire(CSA, [slot] * 4, np.arange(4, 8)), x, x, w)
        write_compressed(manager.acquire(CSA, [slot] * 4, np.arange(128, 132)), x, x, w)
    manager.release_request(b)
    write_compressed(manager.acquire(CSA, [a] * 4, np.arange(4, 8)), x, x, w)
    manager.keep_prefix(a, np.arange(132))
    with pytest.raises(RuntimeError, match="others read too"):
        write_compressed(manager.acquire(CSA, [a] * 4, np.arange(4, 8)), x, x, w)
    write_swa(manager.acquire(SWA, [a] * 4, np.arange(4, 8)), x[:, :512])
    manager.check()


def test_other_slots_and_blocks_stay(make, rng, weights, same):
    """A write touches one row per array and token, in its own layer, slot and block."""
    manager = make()
    a, b = manager.admit_request(), manager.admit_request()
    manager.allocate_block(CSA, a)
    block = manager.allocate_block(CSA, b)
    x = random(rng, 4, 1024)
    handle = write_swa(manager.acquire(CSA, [b] * 4, np.arange(4)), x[:, :512])
    handle = write_compressed(handle, x, x, weights(4, 512, 2))
    before, after = manager.cache, handle.cache

    def changed(old, new, axes):
        return {tuple(i[:axes]) for i in np.argwhere(np.asarray(old) != np.asarray(new)).tolist()}

    old, new = before.state["csa"].ring, after.state["csa"].ring
    assert changed(old.pos, new.pos, 3) == {(0, b, row) for row in range(4)}
    assert changed(old.nope, new.nope, 3) == {(0, b, row) for row in range(4)}
    assert changed(before.paged["csa"].entries.nope, after.paged["csa"].entries.nope, 3) == {(0, block, 0)}
    assert changed(before.state["csa"].tail.ka, after.state["csa"].tail.ka, 3) == {(0, b, row) for row in range(4)}
    assert same(after.state["hca"], before.state["hca"])


def test_errors_name_layer_and_shape(make, rng, weights):
    manager = make()
    manager.admit_request()
    swa, csa, hca = (manager.acquire(layer, [0], [0]) for layer in (SWA, CSA, HCA))
    good, wide, w = jnp.ones((1, 512)), jnp.ones((1, 1024)), weights(4, 512, 2)
    for call, message in [
        (lambda: swa.write_swa(jnp.ones((2, 512))), r"layer 0: kv has shape \(2, 512\), expected \(1, 512\)"),
        (lambda: swa.write_swa(jnp.ones((1, 511))), r"shape \(1, 511\)"),
        (lambda: swa.write_swa(jnp.ones((1, 512), jnp.int32)), "layer 0: kv has dtype int32"),
        (lambda: swa.write_compressed(good, good, w), "layer 0 is SWA: it has no compressed entries"),
        (lambda: swa.read_classical_view(), "layer 0 is SWA"),
        (lambda: hca.write_indexer(good, good, w), "layer 2 is HCA: it has no indexer keys"),
        (lambda: hca.read_indexer_view(), "layer 2 is HCA"),
        (lambda: csa.write_compressed(good, good, w), r"layer 1: kv has shape \(1, 512\), expected \(1, 1024\)"),
        (lambda: csa.write_indexer(good, good, w), r"expected \(1, 256\)"),
        (lambda: csa.write_compressed(wide, wide, None), "weights is a NoneType, expected CompressorWeights"),
        # Each of these would broadcast, and compress something else.
        (
            lambda: csa.write_compressed(wide, wide, w._replace(ape=w.ape[:1])),
            r"weights.ape has shape \(1, 1024\)",
        ),
        (
            lambda: csa.write_compressed(wide, wide, w._replace(norm=w.norm[:1])),
            r"norm has shape \(1,\), expected",
        ),
        (lambda: csa.write_compressed(wide, wide, w._replace(inv_freq=w.inv_freq[:9])), r"\(9,\), expected \(32,\)"),
        (lambda: swa.write_swa([[0.0] * 512]), r"kv is a list, expected an array \(1, 512\)"),
        (lambda: csa.read_classical_view(jnp.zeros(4, jnp.int32)), r"selected has shape \(4,\), expected \(1, K\)"),
        (lambda: csa.read_classical_view(jnp.zeros((1, 4))), "selected has dtype float32, expected int32"),
        (lambda: swa.read_swa_view(dtype=jnp.int32), "dtype is int32, expected a floating one"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_one_program_for_every_step(make, rng):
    """A jitted step takes the cache, donates it, and is traced once."""
    manager = make()
    slots = [manager.admit_request(), manager.admit_request()]

    @chex.assert_max_traces(n=1)
    def step(cache, plan, kv):
        handle = LayerCacheHandle(cache.with_blocks(plan.new_blocks), plan, SWA).write_swa(kv)
        return handle.cache, handle.read_swa_view().valid.sum(axis=-1)

    step = jax.jit(step, donate_argnums=0)
    at = np.zeros(2, np.int32)
    for i in range(140):  # across the ring's wrap and new blocks; the second request sits out every third step
        live = np.array([True, i % 3 > 0])
        plan = manager.plan_step(np.where(live, slots, -1), at)
        manager.cache, visible = step(manager.cache, plan, random(rng, 2, 512))
        at = at + live
        assert visible.tolist() == np.where(live, np.minimum(at, 128), 0).tolist()


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_ue8m0", "bf16", "fp32"])
def test_every_record_reads_back_within_its_error(make, rng, weights, cache_dtype):
    """Window and entries in every form; the engines' form also as its 584 bytes."""
    manager = make(cache_dtype=cache_dtype)
    slot = manager.admit_request()
    manager.allocate_block(CSA, slot)
    kv, x = random(rng, 8, 512), random(rng, 8, 1024)
    handle = write_swa(manager.acquire(CSA, [slot] * 8, np.arange(8)), kv)
    handle = write_compressed(handle, x, x, weights(4, 512, 2))
    window, entries = on_host(read_window(handle)), on_host(read_entries(handle))
    exact = reference_entries(x, x, weights(4, 512, 2), 4, True)
    # A code is half a step off at most: 2^-4 of a value for the 3 bits of E4M3, 2^-8 for the 7 of BF16.
    error = {"fp8": 2.0**-4, "fp8_ue8m0": 2.0**-4, "bf16": 2.0**-8, "fp32": 1e-5}[cache_dtype]
    got = window.kv[0][np.argsort(np.where(window.positions[0] < 0, 999, window.positions[0]))[:8]]
    tiny = 0.004 if "fp8" in cache_dtype else 1e-5  # E4M3's smallest step at these scales, and the pooling's rounding
    np.testing.assert_allclose(got, kv, rtol=error, atol=tiny)
    np.testing.assert_allclose(entries.kv[0, :2], exact, rtol=error * 1.01, atol=tiny)
    if cache_dtype == "fp8_ue8m0":
        stored = handle.paged.entries
        packed = pack_records(stored)
        assert packed.shape == (4, 32, 584)
        for a, b in zip(unpack_records(packed, 64), stored, strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(ValueError, match="584 bytes for 448"):
            unpack_records(packed[..., :583], 64)
    else:
        with pytest.raises(ValueError, match="only the fp8_ue8m0 form"):
            pack_records(handle.paged.entries)
