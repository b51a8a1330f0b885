"""Reads on the GPU beyond the shared suite (tests/ops/read/test_reads.py): sizes, and many in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.read.entries import read_entries
from dsv4_jax.ops.read.window import read_window
from dsv4_jax.ops.write.append_swa import SWARing

pytestmark = pytest.mark.gpu


def empty(*shape, grouped):
    scale = jnp.zeros((*shape, 8), jnp.uint8) if grouped else jnp.zeros(shape, jnp.float32)
    return Record(jnp.zeros((*shape, 448), jnp.uint8), jnp.zeros((*shape, 64), jnp.bfloat16), scale)


def fill(record, at, grouped):
    """The record at `at` is all ones: code 0x38, scale 1."""
    one = Record(0x38, 1, 127 if grouped else 1)
    return jax.tree.map(lambda x, v: x.at[at].set(jnp.asarray(v, x.dtype)), record, one)


@pytest.mark.parametrize("grouped", [False, True], ids=["fp8", "fp8_ue8m0"])
def test_offsets_beyond_32_bits(grouped):
    layers, blocks = 2, 80_000  # 2.3e9 bytes of codes
    pool = empty(layers, blocks, 32, grouped=grouped)
    assert pool.nope.size > 2**31
    for at in ((0, 0, 0), (layers - 1, blocks - 1, 31)):
        pool = fill(pool, at, grouped)
    table = jnp.array([[0, blocks - 1]], jnp.int32)
    slots, counts, selected = jnp.zeros(1, jnp.int32), jnp.full(1, 64, jnp.int32), jnp.array([[0, 63, 1]], jnp.int32)
    for layer, ones in ((0, [1, 0, 0]), (layers - 1, [0, 1, 0])):
        got = read_entries(pool, table, slots, counts, selected, layer=layer, implementation="cuda")
        np.testing.assert_array_equal(got[0], np.repeat(np.float32(ones)[:, None], 512, axis=1))
    shape = (layers, blocks * 32 // 128, 128)
    record = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[3:]), pool)
    ring = SWARing(*record, jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], jnp.int32))
    got, _ = read_window(
        ring, jnp.array([0, shape[1] - 1], jnp.int32), jnp.full(2, 127, jnp.int32), layer=layers - 1, window=128,
        implementation="cuda",
    )  # fmt: skip
    assert float(got.sum()) == 512
    assert (got[1, 127] == 1).all()


def test_reads_between_writes_in_one_call_are_replayed(rng):
    """Every step reads what the steps before it left, layer by layer, in one command buffer."""
    layers, steps = 4, 6

    def body(i, state):
        ring, seen = state
        for layer in range(layers):
            where = jnp.zeros(1, jnp.int32), jnp.full(1, 3, jnp.int32)
            kv, _ = read_window(ring, *where, layer=layer, window=4, implementation="cuda")
            seen = seen.at[i, layer].set(kv.sum())
            row = (i % 4).astype(jnp.int32)
            value = kv.sum() * 0 + i.astype(jnp.float32) + 1
            values = jnp.full(64, value).astype(jnp.bfloat16)
            ring = ring._replace(rope=ring.rope.at[layer, 0, row].set(values))
        return ring, seen

    record = empty(layers, 1, 4, grouped=False)
    ring = SWARing(*record, jnp.zeros((layers, 1, 4), jnp.int32), jnp.zeros((layers, 1), jnp.int32))
    run = jax.jit(lambda ring: jax.lax.fori_loop(0, steps, body, (ring, jnp.zeros((steps, layers)))))
    _, seen = run(ring)
    held, expected = np.zeros(4), []
    for i in range(steps):
        expected.append(64 * held.sum())
        held[i % 4] = i + 1
    np.testing.assert_array_equal(seen, np.repeat(np.float32(expected)[:, None], layers, axis=1))
