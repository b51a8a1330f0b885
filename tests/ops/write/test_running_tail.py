"""The running tail: precision before quantising, writing a position again, gates that are not finite."""

import jax
import numpy as np
import pytest
from compress_cases import (
    HCA,
    RUNNING,
    apply_step,
    expected_entries,
    expected_sums,
    new_state,
    new_step,
    new_weights,
)

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record

pytestmark = pytest.mark.optimised

IMPLEMENTATIONS = ["jnp", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def decode(g, state, kv, gate, weights, implementation, start=0):
    """Tokens of slot 0 one by one from position `start` on."""
    for i in range(len(kv)):
        step = new_step(np.random.default_rng(0), g, np.array([start + i]), np.array([1]), np.float32, padding=0)
        step = step._replace(kv=kv[i : i + 1], gate=gate[i : i + 1])
        state = apply_step(g, state, step, weights, layer=0, implementation=implementation)
    return state


def exact(state):
    """The state with records of float32."""
    nope, rope = (np.zeros(x.shape, np.float32) for x in state.stored[:2])
    return state._replace(stored=Record(nope, rope, None))


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "sharp"])
def test_entries_are_those_of_a_full_tail_within_1e_6(rng, spread):
    weights = new_weights(rng, HCA)
    kv = rng.standard_normal((256, 512)).astype(np.float32)
    gate = (spread * rng.standard_normal((256, 512))).astype(np.float32)
    expected = expected_entries(HCA, weights, kv, gate)
    table, entries = None, {}
    for g in (HCA, RUNNING):
        state = exact(new_state(rng, g, layers=1, slots=1, columns=2))
        table = state.table if table is None else table
        state = decode(g, state._replace(table=table), kv, gate, weights, "jnp")
        entries[g] = np.concatenate([x[0, table[0], 0] for x in state.stored[:2]], axis=-1)
    for got in (entries[HCA], expected):
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        assert (np.abs(entries[RUNNING] - got) <= 1e-6 * largest).all()
        assert np.linalg.norm(entries[RUNNING] - got) <= 3e-7 * np.linalg.norm(got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rollback", [0, 3])
def test_a_position_can_be_written_again(rng, implementation, rollback):
    """The newest always, and `rollback` tokens, within a window and across its edge."""
    if implementation != "jnp" and implementation not in dispatch.available():
        pytest.skip(f"no native library for {implementation}")
    g = RUNNING._replace(rollback=rollback)
    weights, start = new_weights(rng, g), new_state(rng, g, layers=1, slots=1, columns=2)
    kv, gate, wrong = rng.standard_normal((3, 132, 512)).astype(np.float32)
    with jax.default_device(jax.devices("gpu" if implementation == "cuda" else "cpu")[0]):
        straight = decode(g, start, kv, gate, weights, implementation)
        state = decode(g, start, kv[:125], gate[:125], weights, implementation)
        back = max(rollback, 1)
        for p in range(125, 132, back):  # other tokens first, forgotten, then the right ones
            here = slice(p, min(p + back, 132))
            state = decode(g, state, wrong[here], kv[here], weights, implementation, start=p)
            state = decode(g, state, kv[here], gate[here], weights, implementation, start=p)
    for got, want in zip(jax.tree.leaves(state.stored), jax.tree.leaves(straight.stored), strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
    newest = [p % straight.tail.sums.shape[2] for p in (130, 131)]
    np.testing.assert_array_equal(state.tail.sums[0, 0, newest], straight.tail.sums[0, 0, newest])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_that_are_infinite(rng, implementation):
    """-inf: a weight of nothing, wherever in the window; inf, or nothing but -inf: NaN."""
    if implementation != "jnp" and implementation not in dispatch.available():
        pytest.skip(f"no native library for {implementation}")
    g = RUNNING
    weights, state = new_weights(rng, g), new_state(rng, g, layers=1, slots=1, columns=2)
    kv, gate = rng.standard_normal((2, 128, 512)).astype(np.float32)
    gate[[0, 1, 50, 127], 0] = -np.inf
    expected = expected_sums(g, weights, kv[:127], gate[:127])  # before what follows
    gate[3, 500] = np.inf
    gate[:, 501] = -np.inf
    with jax.default_device(jax.devices("gpu" if implementation == "cuda" else "cpu")[0]):
        state = decode(g, state, kv, gate, weights, implementation)
    sums = state.tail.sums[0, 0, 0].astype(np.float64)  # after position 126
    finite = np.r_[0:500, 502:512]
    for got, want in zip((sums[0], sums[1] + sums[3], sums[2] + sums[4]), expected, strict=False):
        np.testing.assert_allclose(got[finite], want[finite], rtol=1e-6, atol=1e-5)
    entry = state.table[0, 0]
    assert np.isnan(np.asarray(state.stored.rope[0, entry, 0], np.float32)).all()
    assert np.isnan(state.stored.inv_scale[0, entry, 0])
