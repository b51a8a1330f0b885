"""Choosing entries, against float64 arithmetic on the stored keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.formats.fp4 import dequantise_fp4, hadamard_matrix, quantise_fp4
from dsv4_jax.ops.nn.rope import apply_rope, rope_angles, rope_frequencies
from dsv4_jax.ops.read.select import select
from dsv4_jax.ops.segments import Segments, one_token_segments
from dsv4_jax.ops.write.compress import IndexerKeys

E, D, RATIO = 32, 128, 4


def pool(rng, blocks, format="nvfp4", nan=()):
    values = rng.standard_normal((1, blocks, E, D), dtype=np.float32)
    for block, entry in nan:
        values[0, block, entry] = np.nan
    if format == "fp32":
        return IndexerKeys(jnp.asarray(values), None), values
    codes, scale = quantise_fp4(jnp.asarray(values), format)
    return IndexerKeys(codes, scale), np.asarray(dequantise_fp4(codes, scale, format))


def oracle(q, w, keys, format):
    """Float64 scores (E,) of one token."""
    q = q.astype(np.float64)
    if format != "fp32":
        q = q @ hadamard_matrix(D).astype(np.float64)
    return np.maximum(q @ keys.astype(np.float64).T, 0).T @ w.astype(np.float64) * D**-0.5


def check_chosen(chosen, scores, seen, k):
    chosen = chosen[chosen >= 0]
    assert len(set(chosen.tolist())) == len(chosen) == min(k, int(seen.sum()))
    assert seen[chosen].all()
    left = seen.copy()
    left[chosen] = False
    if left.any():  # nothing left out beats what was chosen, but by rounding
        assert scores[left].max() <= scores[chosen].min() + 1e-4 * np.abs(scores[seen]).max()


def decode(q, w, keys, table, slots, visible, k, format="nvfp4", **kwargs):
    where = {"format": format, "layer": 0, "max_entries": table.shape[1] * E, **kwargs}

    @jax.jit
    def call(q, w, keys, table, slots, visible):
        return select(q, w, keys, table, one_token_segments(slots, visible * RATIO), visible, k, **where)

    slots, visible = np.asarray(slots, np.int32), np.asarray(visible, np.int32)
    return np.asarray(call(q, w, keys, table, slots, visible))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp32"])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("k", [1, 64])
def test_against_float64(format, heads, k):
    rng = np.random.default_rng(7)
    keys, values = pool(rng, 12, format)
    table = rng.permutation(12).reshape(2, 6).astype(np.int32)
    visible = [0, 1, k - 1, k, k + 1, 192, 77, 0]
    slots = [0, 1, 0, 1, 0, 1, 0, -1]
    q = rng.standard_normal((8, heads, D), dtype=np.float32)
    w = rng.standard_normal((8, heads), dtype=np.float32)
    chosen = decode(q, w, keys, table, slots, visible, k, format)
    assert chosen.shape == (8, k)
    assert chosen.dtype == np.int32
    for t in range(8):
        mine = values[0, table[max(slots[t], 0)]].reshape(-1, D)
        check_chosen(chosen[t], oracle(q[t], w[t], mine, format), np.arange(192) < visible[t], k)


@pytest.mark.parametrize("zero", ["weights", "query"])
def test_equal_scores_go_to_the_lower_index(zero):
    rng = np.random.default_rng(1)
    keys, _ = pool(rng, 4)
    q = rng.standard_normal((1, 4, D), dtype=np.float32) * (zero != "query")
    w = rng.standard_normal((1, 4), dtype=np.float32) * (zero != "weights")
    chosen = decode(q, w, keys, np.arange(4, dtype=np.int32)[None], [0], [128], 50)
    assert sorted(chosen[0].tolist()) == list(range(50))


def test_nan_is_seen_and_out_of_sight_is_not():
    rng = np.random.default_rng(2)
    table = np.arange(4, dtype=np.int32)[None]
    q, w = rng.standard_normal((1, 4, D), dtype=np.float32), rng.standard_normal((1, 4), dtype=np.float32)
    keys, _ = pool(np.random.default_rng(3), 4)
    broken, _ = pool(np.random.default_rng(3), 4, nan=[(1, 3), (3, 20)])
    plain, got = (decode(q, w, x, table, [0], [100], 8)[0].tolist() for x in (keys, broken))
    assert 35 in got
    assert 116 not in got
    assert len(set(got) - set(plain)) <= 1
    assert decode(q, w, broken, table, [0], [35], 8)[0].tolist() == decode(q, w, keys, table, [0], [35], 8)[0].tolist()
    for sign in (np.nan, -np.nan):
        assert sorted(decode(q * sign, w, keys, table, [0], [100], 8)[0].tolist()) == list(range(8))


def test_entries_without_a_block_are_not_chosen():
    rng = np.random.default_rng(4)
    keys, _ = pool(rng, 4)
    q, w = rng.standard_normal((1, 4, D), dtype=np.float32), -np.ones((1, 4), np.float32)
    table = np.asarray([[0, -1, 2, 3]], np.int32)
    few, all_of_them = (decode(q, w, keys, table, [0], [128], k)[0] for k in (90, 128))
    assert (few >= 0).all()
    assert not ((few >= 32) & (few < 64)).any()
    assert sorted(all_of_them[all_of_them >= 0].tolist()) == [*range(32), *range(64, 128)]
    assert (decode(q, w, keys, table, [0], [128], 200)[0] >= 0).sum() == 96


def test_pieces_and_company_change_nothing():
    """Prefill rows in one piece or in many, with raw queries, choose what each token alone chooses."""
    rng = np.random.default_rng(5)
    keys, _ = pool(rng, 8)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    counts, starts = np.asarray([7, 5]), np.asarray([400, 280])
    tokens = np.full((2, 7), 12, np.int32)
    rows, slots, positions = np.zeros(12, np.int32), np.zeros(12, np.int32), np.zeros(12, np.int32)
    for s, (count, start, base) in enumerate(zip(counts, starts, (0, 7), strict=True)):
        tokens[s, :count] = base + np.arange(count)
        rows[base : base + count] = s * 7 + np.arange(count)
        slots[base : base + count], positions[base : base + count] = s, start + np.arange(count)
    segments = Segments(*(jnp.asarray(x, jnp.int32) for x in ([0, 1], starts, counts, tokens, rows)))
    q, w = rng.standard_normal((12, 4, D), dtype=np.float32), rng.standard_normal((12, 4), dtype=np.float32)
    visible = jnp.asarray((positions + 1) // RATIO, jnp.int32)
    cos, sin = rope_angles(jnp.asarray(positions), jnp.asarray(rope_frequencies(64, 160000.0)))
    where = {"format": "nvfp4", "layer": 0, "max_entries": 128}

    def run(q, raw, piece_bytes):
        call = jax.jit(lambda q, w: select(
            q, w, keys, jnp.asarray(table), segments, visible, 20, raw=raw, piece_bytes=piece_bytes, **where
        ))  # fmt: skip
        return np.sort(np.asarray(call(jnp.asarray(q), jnp.asarray(w))), axis=1)

    whole = run(q, (cos, sin), 1 << 30)
    np.testing.assert_array_equal(run(q, (cos, sin), 2 * 4 * 128 * 4 * 3), whole)
    rotated = np.asarray(apply_rope(jnp.asarray(q), cos[:, None], sin[:, None]))
    np.testing.assert_array_equal(run(rotated, None, 1), whole)
    alone = decode(rotated, w, keys, table, slots, visible, 20)
    np.testing.assert_array_equal(np.sort(alone, axis=1), whole)
