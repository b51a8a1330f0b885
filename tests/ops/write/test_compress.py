"""compress and compress_indexer: one suite for every implementation, against the definition in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_cases import (
    BF16,
    CSA,
    EPS,
    HCA,
    MXFP4,
    NVFP4,
    RUNNING,
    Geometry,
    State,
    apply_step,
    expected_entries,
    expected_sums,
    history,
    new_state,
    new_step,
    new_weights,
)
from forms import form_of_operation

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.fp4 import dequantise_fp4
from dsv4_jax.ops.formats.record import Record, decode_record
from dsv4_jax.ops.segments import StepTokens, one_token_segments
from dsv4_jax.ops.write.compress import Projections, compress, compress_indexer
from dsv4_jax.ops.write.compressor_tail import closing_positions
from dsv4_jax.ops.write.running_tail import RunningTail

KINDS = [
    pytest.param(g, id=n)
    for n, g in {"csa": CSA, "hca": HCA, "hca-running": RUNNING, "nvfp4": NVFP4, "mxfp4": MXFP4}.items()
]
IMPLEMENTATIONS = [
    pytest.param(("jnp", "cpu"), id="jnp-cpu"),
    pytest.param(("cpu", "cpu"), id="native-cpu"),
    pytest.param((None, "cpu"), id="automatic-cpu"),
    pytest.param(("cuda", "gpu"), id="native-gpu", marks=pytest.mark.gpu),
    pytest.param((None, "gpu"), id="automatic-gpu", marks=pytest.mark.gpu),
]
# Tokens a step brings for each of 4 slots (slot 4 stays empty): decode, drafts, chunks that start inside a window,
# chunks longer than the tail, and a slot that pauses.
SHORT_STEPS = [(1, 1, 0, 3), (1, 1, 0, 1), (5, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (30, 4, 3, 0), (2, 9, 1, 1)]
LONG_STEPS = [(1, 127, 130, 0), (1, 1, 1, 1), (280, 2, 0, 126), (1, 0, 5, 1), (1, 1, 120, 1), (80, 260, 129, 0)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with form_of_operation(*request.param) as name:
        yield name


def bits(x):
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


def assert_same_bits(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def play(rng, g, steps, dtype=np.float32, layer=1, **options):
    """Runs the steps; returns the states before and after, the steps, the weights and the lengths."""
    before, weights, lengths = new_state(rng, g), new_weights(rng, g), np.zeros(4, np.int64)
    state, played = before, []
    for counts in steps:
        width = max(map(max, steps))
        played.append(new_step(rng, g, lengths, np.array(counts), dtype, width=width))
        state = apply_step(g, state, played[-1], weights, layer=layer, **options)
    return before, state, played, weights, lengths


@functools.partial(jax.jit, static_argnums=1)
def read_values(rows, key_format):
    return dequantise_fp4(*rows, key_format) if key_format else decode_record(Record(*rows))


def stored_values(g, stored, rows):
    """Entries at rows of one layer, as float64."""
    some = np.resize(rows, max(16, len(rows)))  # few shapes: each is compiled
    taken = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:])[some]), stored)
    return np.asarray(read_values(tuple(taken), g.key_format), np.float64)[: len(rows)]


def steps_around(g, x, stored, rows):
    """How far quantising may move values x: half a code step, a little more for the rounding before it."""
    if g.key_format:
        group = g.dim // stored.scale.shape[-1]
        amax = np.abs(x).reshape(len(x), -1, group).max(-1, keepdims=True)
        # Scale up to 2 amax / 6 (mxfp4), steps of 2 from 4 to 6 and of half a scale below 2.
        step = np.maximum(amax / 6 * (2 if g.key_format == "mxfp4" else 1.07), 2.0**-9)
        return np.broadcast_to(step, (len(x), g.dim // group, group)).reshape(x.shape) * 1.001
    scale = stored.inv_scale.reshape(-1)[rows][:, None].astype(np.float64)
    fp8 = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * 1.001
    fp8[:, -g.rope_dim :] = np.abs(x[:, -g.rope_dim :]) * 2.0**-8 + 1e-5
    return fp8


def check_and_take_rows(g, weights, kv, gate, got, was):
    """Enters what the tail `got` of a request must hold, bit for bit, in what it held before."""
    z = gate.astype(np.float32) + weights.ape[np.arange(len(gate)) % g.ratio]
    for lane, (k_rows, z_rows) in enumerate((was[:2], was[2:])[: g.lanes]):
        channels = slice(lane * g.dim, (lane + 1) * g.dim)
        for p in range(max(0, len(kv) - g.rows[lane]), len(kv)):
            k_rows[p % g.rows[lane]] = kv[p, channels].astype(np.float32)
            z_rows[p % g.rows[lane]] = z[p, channels]


def check_and_take_sums(g, weights, kv, gate, got, was):
    """Checks the sums `got` (rows, 5, d) of a request, to 1e-6, and enters them in what was there before."""
    got, was = got.sums, was.sums
    rows = len(was)
    for n in range(max(0, len(kv) - rows), len(kv)):
        if n % g.ratio == g.ratio - 1:
            was[n % rows] = got[n % rows]  # never read; what an earlier token of the window left there
            continue
        top, total, weighted, magnitude = expected_sums(g, weights, kv[: n + 1], gate[: n + 1])
        sums = got[n % rows].astype(np.float64)
        np.testing.assert_array_equal(sums[0], top)
        np.testing.assert_allclose(sums[1] + sums[3], total, rtol=1e-6)
        assert (np.abs(sums[2] + sums[4] - weighted) <= 1e-6 * magnitude).all()
        was[n % rows] = got[n % rows]


def entry_rows(g, table, slot, n):
    entry = np.arange(n)
    return table[slot, entry // g.per_block] * g.per_block + entry % g.per_block


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("g", KINDS)
def test_steps_of_any_mix_store_what_the_definition_says(implementation, rng, g, dtype):
    steps = LONG_STEPS if g.ratio == 128 else SHORT_STEPS
    before, after, played, weights, _ = play(rng, g, steps, dtype, implementation=implementation)
    untouched = jax.tree.map(lambda x: np.array(x[1]), before)._replace(table=before.table)
    stored = jax.tree.map(lambda x: x[1], after.stored)
    entries = 0
    for slot in range(4):
        kv, gate = history(played, slot)
        x = expected_entries(g, weights, kv, gate)
        rows = entry_rows(g, after.table, slot, len(x))
        error = np.abs(stored_values(g, stored, rows) - x)
        assert (error <= steps_around(g, x, stored, rows)).all()
        entries += len(x)
        # The newest tokens lie in the tail, bit for bit; nothing else there has changed.
        check_and_take = check_and_take_sums if g.running else check_and_take_rows
        of_slot = jax.tree.map(lambda x, slot=slot: x[slot], (jax.tree.map(lambda x: x[1], after.tail), untouched.tail))
        check_and_take(g, weights, kv, gate, *of_slot)
        for got, was in zip(jax.tree.leaves(stored), jax.tree.leaves(untouched.stored), strict=True):
            was.reshape(-1, *was.shape[2:])[rows] = got.reshape(-1, *got.shape[2:])[rows]
    assert entries > 8
    assert_same_bits(jax.tree.map(lambda x: x[1], after.tail), untouched.tail)
    assert_same_bits(stored, untouched.stored)
    assert_same_bits(
        jax.tree.map(lambda x: x[0], (after.stored, after.tail)),
        jax.tree.map(lambda x: x[0], (before.stored, before.tail)),
    )


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(BF16, marks=pytest.mark.optimised)])
@pytest.mark.parametrize("g", KINDS)
def test_native_codes_are_those_of_jax_numpy(rng, g, dtype):
    """All but those on a rounding boundary, and the tail bit for bit."""
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    steps = LONG_STEPS if g.ratio == 128 else SHORT_STEPS * 2
    seed = int(rng.integers(2**31))
    with jax.default_device(jax.devices("cpu")[0]):
        _, plain, *_ = play(np.random.default_rng(seed), g, steps, dtype, implementation="jnp")
        _, got, played, weights, _ = play(np.random.default_rng(seed), g, steps, dtype, implementation="cpu")
    if g.running:
        for slot in range(4):
            kv, gate = history(played, slot)
            check_and_take_sums(g, weights, kv, gate, *(RunningTail(s.tail.sums[1, slot].copy()) for s in (got, plain)))
    else:
        assert_same_bits(got.tail, plain.tail)
    written = bits(plain.stored[0]) != 0xAA
    assert written.sum() > 1000
    for a, b in zip(jax.tree.leaves(got.stored), jax.tree.leaves(plain.stored), strict=True):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            differ = bits(a).astype(np.int64) - bits(b)
            if a.dtype == np.uint8 and not g.key_format:
                assert np.abs(differ).max() <= 1
            assert np.count_nonzero(differ) <= 1e-3 * written.sum()


@pytest.mark.parametrize("rollback", [0, 3])
@pytest.mark.parametrize("g", KINDS)
def test_results_do_not_depend_on_how_tokens_come(implementation, rng, g, rollback):
    """One at a time, in chunks or all at once: the same bits."""
    if implementation == "jnp":
        pytest.skip("XLA may sum in another order for another shape")
    g = g._replace(rollback=rollback)
    n = 263 if g.ratio == 128 else 41
    state, weights, lengths = new_state(rng, g), new_weights(rng, g), np.zeros(1, np.int64)
    whole = new_step(rng, g, lengths, np.array([n]), BF16, padding=0, width=n, shuffled=False)
    ends = []
    for cuts in ([0, n], [0, 1, 6, n // 2, n - 9, n - 1, n], [*range(n - 20, n + 1)]):
        got = state
        for a, b in zip([0, *cuts], cuts, strict=False):
            if a == b:
                continue
            counts, at = np.array([b - a]), np.array([a])
            step = new_step(rng, g, at, counts, BF16, padding=0, width=n, shuffled=False)  # one shape, and a token's
            kv, gate = step.kv, step.gate
            kv[: b - a], gate[: b - a] = whole.kv[a:b], whole.gate[a:b]
            got = apply_step(g, got, step, weights, layer=0, implementation=implementation)
        ends.append(got)
    for other in ends[1:]:
        assert_same_bits(other.stored, ends[0].stored)
        assert_same_bits(other.tail, ends[0].tail)


@pytest.mark.parametrize("g", KINDS)
def test_padding_and_what_is_out_of_range_write_nothing(implementation, rng, g):
    state, weights = new_state(rng, g), new_weights(rng, g)
    last = g.ratio * g.per_block - 1  # closes the last entry of the first block
    state.table[1, 0] = -1
    state.table[2, 0] = 10**6
    slots = np.array([-1, 5, 2**31 - 1, 0, 3, -(2**31)], np.int32)
    positions = np.array([last, last, last, -1, -(2**31), 3], np.int32)
    shape = (6, g.lanes * g.dim)
    kv, gate = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
    options = {"layer": 0, "implementation": implementation}

    def step(slots, positions):
        slots, positions = np.array(slots, np.int32), np.array(positions, np.int32)
        segments = one_token_segments(jnp.asarray(slots), jnp.asarray(positions))
        n = len(slots)
        return apply_step(g, state, type(NO_STEP)(kv[:n], gate[:n], slots, positions, segments), weights, **options)

    got = step(slots, positions)
    assert_same_bits((got.stored, got.tail), (state.stored, state.tail))
    # No block in the table, one that the pool lacks, a column beyond the table: the token still enters the tail.
    got = step([1, 2, 3, -1, -1, -1], [last, last, 6 * g.ratio * g.per_block + last, last, last, last])
    assert_same_bits(got.stored, state.stored)
    if not g.running:  # whose sums end with the window
        assert np.isfinite(got.tail.ka[0, 1:4]).any(axis=(1, 2)).all()
    none = step([], [])
    assert_same_bits((none.stored, none.tail), (state.stored, state.tail))


def test_the_last_window_that_int32_holds_closes():
    newest = 2**31 - 1
    for ratio in (4, 128):
        for position, closing in ((newest, True), (newest - 1, False), (newest - ratio, True)):
            segments = one_token_segments(jnp.zeros(1, jnp.int32), jnp.array([position], jnp.int32))
            last, closes = closing_positions(segments, ratio)
            assert (int(last[0, 0]), bool(closes[0, 0])) == (newest - ratio * (position == newest - ratio), closing)


NO_STEP = new_step(np.random.default_rng(0), NVFP4, np.zeros(1, np.int64), np.array([0]), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "g", [pytest.param(CSA, id="csa"), pytest.param(HCA, id="hca"), pytest.param(NVFP4, id="nvfp4")]
)
def test_a_value_that_is_not_finite_is_never_quietly_a_number(implementation, rng, g, value):
    state, weights, lengths = new_state(rng, g), new_weights(rng, g), np.zeros(2, np.int64)
    n = 2 * g.ratio
    step = new_step(rng, g, lengths, np.array([n, n]), np.float32, padding=0, shuffled=False)
    step.kv[g.ratio + 1, -1] = value  # second window of slot 0, the lane of the window itself, a RoPE channel
    got = apply_step(g, state, step, weights, layer=0, implementation=implementation)
    values = stored_values(g, jax.tree.map(lambda x: x[0], got.stored), entry_rows(g, got.table, 0, 2))
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1]).any()
    rows = entry_rows(g, got.table, 1, 2)
    assert np.isfinite(stored_values(g, jax.tree.map(lambda x: x[0], got.stored), rows)).all()


@pytest.mark.parametrize("g", [pytest.param(NVFP4, id="nvfp4"), pytest.param(MXFP4, id="mxfp4")])
def test_keys_can_be_stored_without_the_rotation(implementation, rng, g):
    _, after, played, weights, _ = play(rng, g, SHORT_STEPS, implementation=implementation, rotate=False)
    x = expected_entries(g, weights, *history(played, 0), rotate=False)
    rows, stored = entry_rows(g, after.table, 0, len(x)), jax.tree.map(lambda x: x[1], after.stored)
    assert (np.abs(stored_values(g, stored, rows) - x) <= steps_around(g, x, stored, rows)).all()


@pytest.mark.parametrize("implementation", ["jnp", "cpu", None])
@pytest.mark.parametrize(
    "g",
    [
        Geometry(4, 2, 24, 8, 32),
        Geometry(128, 1, 30, 6, 1),
        Geometry(128, 1, 30, 6, 1, running=True),
        Geometry(2, 1, 64, 16, 4),
        MXFP4._replace(dim=32, rope_dim=8),
    ],
)
def test_geometry_is_data(rng, g, implementation):
    if implementation == "cpu" and "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    steps = LONG_STEPS if g.ratio == 128 else [(1, 2, 0, 7), (1, 9, 1, 1)]
    with jax.default_device(jax.devices("cpu")[0]):
        _, after, played, weights, _ = play(rng, g, steps, implementation=implementation)
    for slot in range(4):
        x = expected_entries(g, weights, *history(played, slot))
        if not len(x):
            continue
        rows, stored = entry_rows(g, after.table, slot, len(x)), jax.tree.map(lambda x: x[1], after.stored)
        assert (np.abs(stored_values(g, stored, rows) - x) <= steps_around(g, x, stored, rows)).all()


# The update is in place.


def assert_in_place(g, implementation, tokens=2, layers=6):
    rng = np.random.default_rng(0)
    op = compress if g.key_format is None else functools.partial(compress_indexer, format=g.key_format)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(stored, tail, kv, gate, weights, slots, positions, table):
        where = StepTokens(slots, positions, one_token_segments(slots, positions), table)
        for layer in range(layers):
            given = Projections(kv, gate, weights)
            stored, tail = op(stored, tail, given, where, layer=layer, eps=EPS, implementation=implementation)
            read = stored[0][layer, slots, 0, : kv.shape[1] // 8].astype(jnp.float32)
            kv = kv + jnp.sum(read, axis=-1, keepdims=True)
        return stored, tail, kv

    state = jax.tree.map(jnp.asarray, new_state(rng, g, layers=layers))
    kv = jnp.zeros((tokens, g.lanes * g.dim), jnp.float32)
    at = jnp.zeros(tokens, jnp.int32)
    compiled = step.lower(state.stored, state.tail, kv, kv, new_weights(rng, g), at, at, state.table).compile()
    arrays = jax.tree.leaves((state.stored, state.tail))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in arrays)
    shapes = {",".join(map(str, x.shape)) for x in arrays}
    copies = re.findall(r"\w+\[([\d,]*)\]\S* copy", compiled.as_text())
    assert not shapes & set(copies)


@pytest.mark.optimised
@pytest.mark.parametrize("g", KINDS)
def test_a_donated_stack_is_updated_in_place(g):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert_in_place(g, None)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cuda", None])
@pytest.mark.parametrize("g", KINDS)
def test_a_donated_stack_is_updated_in_place_on_the_gpu(g, implementation):
    assert_in_place(g, implementation)


# Mistakes end in one clear sentence.


def test_an_implementation_that_cannot_serve_is_refused_by_name(rng, monkeypatch):
    g = Geometry(4, 2, 32, 8, 32)
    state, weights, lengths = new_state(rng, g), new_weights(rng, g), np.zeros(2, np.int64)
    step = new_step(rng, g, lengths, np.array([1, 1]), np.float32)
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({"cpu", "cuda"}))
    with pytest.raises(ValueError, match=r"'cuda' cannot be used: of \(ratio, lanes, d, RoPE part\) it supports only"):
        apply_step(g, state, step, weights, layer=0, implementation="cuda")
    with pytest.raises(ValueError, match="compress: got implementation 'tpu'; expected None, 'jnp', 'cpu' or 'cuda'"):
        apply_step(g, state, step, weights, layer=0, implementation="tpu")
    exact = State(Record(*(np.zeros(x.shape, np.float32) for x in state.stored[:2]), None), *state[1:])
    with pytest.raises(ValueError, match="'cpu' cannot be used: it stores only FP8 records and FP4 keys"):
        apply_step(g, exact, step, weights, layer=0, implementation="cpu")
    monkeypatch.setattr(dispatch, "available", frozenset)
    with pytest.raises(ValueError, match="the native library for 'cpu' is not installed"):
        apply_step(g, state, step, weights, layer=0, implementation="cpu")


@pytest.mark.parametrize(
    ("platform", "g", "native_form"),
    [
        ("cuda", CSA, True),
        ("cuda", Geometry(2, 2, 512, 64, 64), False),
        ("cuda", Geometry(4, 2, 48, 16, 2), False),
        ("cuda", MXFP4._replace(ratio=2), False),
        ("cpu", Geometry(4, 2, 48, 16, 2), True),
        ("cpu", Geometry(4, 2, 49, 16, 2), False),
    ],
)
def test_a_geometry_no_native_form_serves_falls_back(rng, monkeypatch, platform, g, native_form):
    """The program calls the native form where it serves the geometry, and has nothing but jax.numpy elsewhere."""
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({platform}))
    monkeypatch.setattr(dispatch, "platforms", lambda: frozenset({platform}))
    state, weights, lengths = new_state(rng, g), new_weights(rng, g), np.zeros(2, np.int64)
    step = new_step(rng, g, lengths, np.array([1, 1]), np.float32)
    op = compress if g.key_format is None else functools.partial(compress_indexer, format=g.key_format)
    program = jax.make_jaxpr(lambda *args: op(*args, layer=0, eps=EPS))(
        *state[:2], Projections(step.kv, step.gate, weights), StepTokens(*step[2:], state.table)
    )
    assert ("dsv4_compress" in str(program)) == native_form


def test_keys_of_another_format_are_refused(rng):
    state, weights = new_state(rng, NVFP4), new_weights(rng, NVFP4)
    step = new_step(rng, NVFP4, np.zeros(2, np.int64), np.array([1, 1]), np.float32)
    with pytest.raises(ValueError, match=r"got keys.scale \(2, 31, 32, 8\); expected a scale per 32 of 128 values"):
        apply_step(MXFP4, state, step, weights, layer=0)


def test_the_handler_checks_what_it_gets(rng):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    state, weights = new_state(rng, CSA), new_weights(rng, CSA)
    step = new_step(rng, CSA, np.zeros(2, np.int64), np.array([1, 1]), np.float32, padding=0)
    with jax.default_device(jax.devices("cpu")[0]):
        for changes, message in (
            ({"layer": 2}, "compress: got layer 2; expected 0 to 1"),
            ({"state": state._replace(table=state.table[:3])}, r"compress: got table \(3, 6\); expected \(5, 6\)"),
            ({"step": step._replace(kv=step.kv[:, 1:])}, r"compress: got kv \(2, 1023\); expected \(2, 1024\)"),
        ):
            arguments = {"state": state, "step": step, "layer": 0} | changes
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                apply_step(CSA, weights=weights, implementation="cpu", **arguments)
