"""compress on the GPU beyond the shared suite (tests/ops/write/test_compress.py): the CPU's bits, sizes, graphs."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_cases import (
    CSA,
    CSA_UE8M0,
    EPS,
    HCA,
    HCA_UE8M0,
    MXFP4,
    NVFP4,
    RUNNING,
    State,
    apply_step,
    new_state,
    new_step,
    new_weights,
)

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.segments import StepTokens, one_token_segments
from dsv4_jax.ops.write.compress import CompressorTail, Projections, compress, compress_indexer

pytestmark = pytest.mark.gpu

FREQUENCIES = new_weights(np.random.default_rng(0), CSA).inv_freq

KINDS = [
    pytest.param(g, id=n)
    for n, g in {
        "csa": CSA, "hca": HCA, "csa_ue8m0": CSA_UE8M0, "hca_ue8m0": HCA_UE8M0, "nvfp4": NVFP4, "mxfp4": MXFP4,
        "hca_running": RUNNING._replace(rollback=3), "hca_running_ue8m0": RUNNING._replace(scales=8),
    }.items()
]  # fmt: skip


@pytest.fixture
def same_angles(monkeypatch):
    """cos and sin from a table: backends compute them with different last bits."""
    positions = np.arange(4096, dtype=np.float32)[:, None]

    def from_table(at, inv_freq):
        angles = positions * FREQUENCIES
        return jnp.asarray(np.cos(angles))[at], jnp.asarray(np.sin(angles))[at]

    jax.clear_caches()
    monkeypatch.setattr(sys.modules["dsv4_jax.ops.write.compress"], "rope_angles", from_table)
    yield
    jax.clear_caches()


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        integer = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
        np.testing.assert_array_equal(np.asarray(x).view(integer), np.asarray(y).view(integer))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("g", KINDS)
def test_the_gpu_stores_the_bits_of_the_cpu(same_angles, rng, g, dtype):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    slots, columns = 32, 12 if g.ratio == 128 else 4
    before, weights, lengths = (
        new_state(rng, g, slots=slots, columns=columns),
        new_weights(rng, g),
        np.zeros(slots, int),
    )
    states = {"cpu": before, "cuda": before}
    most = 60 if g.ratio == 4 else 140
    for i in range(8):
        counts = rng.integers(0, most, slots) if i % 2 else np.ones(slots, int)
        step = new_step(rng, g, lengths, counts, dtype, width=most)
        for name, platform in (("cpu", "cpu"), ("cuda", "gpu")):
            with jax.default_device(jax.devices(platform)[0]):
                states[name] = apply_step(g, states[name], step, weights, layer=1, implementation=name)
    assert_same_bits(states["cuda"][:2], states["cpu"][:2])
    written = np.count_nonzero(np.asarray(states["cuda"].stored[0]) != 0xAA, axis=(1, 2, 3))
    assert written[0] == 0
    assert written[1] > 10_000


def test_offsets_beyond_32_bits(rng):
    # 2.5e9 bytes of codes, tails of 4.3e9 bytes and more each.
    blocks, slots = 5_600_000 // 32, 20_000
    stored = Record(
        jnp.zeros((1, blocks, 32, 448), jnp.uint8),
        jnp.zeros((1, blocks, 32, 64), jnp.bfloat16),
        jnp.zeros((1, blocks, 32), jnp.float32),
    )
    long, short = jnp.zeros((1, slots, 110, 512)), jnp.zeros((1, slots, 106, 512))
    tail = CompressorTail(long, jnp.copy(long), short, jnp.copy(short))
    assert stored.nope.size > 2**31
    assert long.nbytes > 2**32
    table = jnp.zeros((slots, 1), jnp.int32).at[slots - 1, 0].set(blocks - 1)
    weights = new_weights(rng, CSA)
    step = jax.jit(functools.partial(compress, layer=0, eps=EPS, implementation="cuda"), donate_argnums=(0, 1))
    at = jnp.array([0, slots - 1], jnp.int32)
    for position in range(4):
        kv = jnp.broadcast_to(jnp.asarray(rng.standard_normal((1, 1024)), jnp.float32), (2, 1024))
        positions = jnp.full(2, position, jnp.int32)
        tokens = StepTokens(at, positions, one_token_segments(at, positions), table)
        stored, tail = step(stored, tail, Projections(kv, kv, weights), tokens)
    first, last = (jax.tree.map(lambda x, b=b: np.asarray(x[0, b, 0]), stored) for b in (0, blocks - 1))
    assert_same_bits(first, last)
    assert np.count_nonzero(first.nope) > 400
    assert int(jnp.count_nonzero(stored.inv_scale)) == 2
    for rows in tail:
        assert_same_bits(rows[0, 0], rows[0, -1])
        assert int(jnp.count_nonzero(jnp.any(rows != 0, axis=(0, 2, 3)))) == 2


@pytest.mark.parametrize("g", KINDS)
def test_many_steps_in_one_call_replay_correctly(same_angles, rng, g):
    op = compress if g.key_format is None else functools.partial(compress_indexer, format=g.key_format)
    layers, slots, steps = 3, 9, g.ratio + 9
    state, weights = new_state(rng, g, layers=layers, slots=slots, columns=3), new_weights(rng, g)
    kv, gate = (jnp.asarray(rng.standard_normal((steps, slots, g.lanes * g.dim)), jnp.float32) for _ in range(2))
    order = jnp.asarray(rng.permutation(slots), jnp.int32)

    def decode(implementation):
        def step(i, carry):
            positions = jnp.full(slots, i, jnp.int32) + order % 3
            tokens = StepTokens(order, positions, one_token_segments(order, positions), jnp.asarray(state.table))
            for layer in range(layers):
                given = Projections(kv[i] + layer, gate[i], weights)
                carry = op(*carry, given, tokens, layer=layer, eps=EPS, implementation=implementation)
            return carry

        run = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry), donate_argnums=0)
        return State(*run(jax.tree.map(lambda x: jnp.asarray(x.copy()), (state.stored, state.tail))), state.table)

    got = decode("cuda")
    with jax.default_device(jax.devices("cpu")[0]):
        kv, gate, order = jax.device_put((kv, gate, order), jax.devices("cpu")[0])
        expected = decode("cpu")
    assert_same_bits(got[:2], expected[:2])
