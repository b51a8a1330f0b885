"""append_swa_fused: RMSNorm, RoPE and the ring write in one operation, against the steps one by one."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from forms import form_of_operation

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record, decode_record
from dsv4_jax.ops.nn.rope import rope_frequencies
from dsv4_jax.ops.segments import StepTokens
from dsv4_jax.ops.write.append_swa import SWARing
from dsv4_jax.ops.write.append_swa_fused import RawWindow, append_swa_fused

EPS = 1e-6
IMPLEMENTATIONS = [
    pytest.param(("jnp", "cpu"), id="jnp-cpu"),
    pytest.param(("cpu", "cpu"), id="native-cpu"),
    pytest.param((None, "cpu"), id="automatic-cpu"),
    pytest.param(("cuda", "gpu"), id="native-gpu", marks=pytest.mark.gpu),
    pytest.param((None, "gpu"), id="automatic-gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with form_of_operation(*request.param) as name:
        yield name


@functools.partial(jax.jit, static_argnames=("layer", "implementation"), donate_argnames="ring")
def append(ring, kv, norm, cos, sin, slots, positions, **options):
    return append_swa_fused(ring, RawWindow(kv, norm, cos, sin), StepTokens(slots, positions), eps=EPS, **options)


def new_ring(*shape, nope=448, rope=64, form="fp8"):
    scale = np.full(shape, -5, np.float32) if form == "fp8" else np.full((*shape, 8), 0x33, np.uint8)
    return SWARing(
        np.full((*shape, nope), 0x55, np.uint8), np.full((*shape, rope), -7, ml_dtypes.bfloat16),
        scale, np.full(shape, -1, np.int32), np.full(shape[:-1], 99, np.int32),
    )  # fmt: skip


def inputs(rng, tokens, dtype, width=512, rope=64):
    kv = (rng.standard_normal((tokens, width)) * 2.0 ** rng.integers(-12, 12, (tokens, 1))).astype(dtype)
    norm = (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)
    positions = rng.integers(0, 300, tokens).astype(np.int32)
    angles = positions[:, None].astype(np.float32) * rope_frequencies(rope, 10000.0)
    return kv, norm, np.cos(angles), np.sin(angles), positions


def expected_values(kv, norm, cos, sin):
    """float64."""
    x = kv.astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm
    width = 2 * cos.shape[-1]
    even, odd = x[:, -width::2].copy(), x[:, -width + 1 :: 2].copy()
    x[:, -width::2], x[:, -width + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
    return x


def bits(x):
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_stored_is_the_normalised_rotated_token(implementation, rng, dtype):
    tokens = 400
    kv, norm, cos, sin, positions = inputs(rng, tokens, dtype)
    slots = rng.integers(-1, 4, tokens).astype(np.int32)
    before = new_ring(2, 3, 128)
    got = append(
        jax.tree.map(jnp.asarray, before), kv, norm, cos, sin, slots, positions, layer=1, implementation=implementation
    )
    got = jax.tree.map(np.asarray, got)
    x = expected_values(kv, norm, cos, sin)
    one = jax.tree.map(lambda a: a[1], got)
    values = np.asarray(decode_record(Record(*map(jnp.asarray, one[:3]))), np.float64)
    written = 0
    for s in range(3):
        newest = positions[slots == s].max()
        for row in range(128):
            mine = np.flatnonzero((slots == s) & (positions % 128 == row) & (positions > newest - 128))
            if not mine.size:
                assert one.pos[s, row] == -1
                assert (one.nope[s, row] == 0x55).all()
                continue
            written += 1
            t = mine[-1]
            assert one.pos[s, row] == positions[t]
            step = np.abs(x[t]) * 2.0**-4
            step = np.maximum(step, one.inv_scale[s, row] * 2.0**-10) * 1.001
            step[448:] = np.abs(x[t, 448:]) * 2.0**-8 + 1e-5
            assert (np.abs(values[s, row] - x[t]) <= step).all()
    assert written > 80
    for a, b in zip(got, before, strict=True):
        np.testing.assert_array_equal(bits(a[0]), bits(b[0]))


@pytest.mark.optimised
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_native_bits_are_those_of_jax_numpy_but_for_rounding_boundaries(rng, dtype, form, platform):
    """And those of the CPU on the GPU, without exception."""
    if not {"cpu", platform} <= dispatch.available():
        pytest.skip("no native library")
    *args, _ = inputs(rng, 5000, dtype)
    slots = np.arange(5000, dtype=np.int32) // 128
    ends = {}
    for name in ("jnp", "cpu", platform):
        with jax.default_device(jax.devices("gpu" if name == "cuda" else "cpu")[0]):
            ring = jax.tree.map(jnp.asarray, new_ring(40, 128, form=form))
            at = np.arange(5000, dtype=np.int32) % 128
            ends[name] = jax.tree.map(np.asarray, append(ring, *args, slots, at, implementation=name))
    for a, b in zip(ends[platform], ends["cpu"], strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    if form == "fp8":
        np.testing.assert_allclose(ends["cpu"].inv_scale, ends["jnp"].inv_scale, rtol=1e-6)
    else:
        assert np.count_nonzero(ends["cpu"].inv_scale != ends["jnp"].inv_scale) <= 1e-4 * ends["cpu"].inv_scale.size
    for a, b in zip(ends["cpu"][:2], ends["jnp"][:2], strict=True):
        assert np.count_nonzero(bits(a) != bits(b)) <= 1e-3 * a.size
    for a, b in zip(ends["cpu"][3:], ends["jnp"][3:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["jnp", "cpu", None])
def test_other_widths(implementation, rng):
    if implementation == "cpu" and "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    kv, norm, cos, sin, _ = inputs(rng, 6, np.float32, width=38, rope=8)
    with jax.default_device(jax.devices("cpu")[0]):
        got = append(
            jax.tree.map(jnp.asarray, new_ring(6, 4, nope=30, rope=8)), kv, norm, cos, sin,
            np.arange(6, dtype=np.int32), np.zeros(6, np.int32), implementation=implementation,
        )  # fmt: skip
    values = np.asarray(decode_record(Record(*(a[:, 0] for a in got[:3]))), np.float64)
    np.testing.assert_allclose(values, expected_values(kv, norm, cos, sin), rtol=2.0**-4, atol=0.01)


def test_wrong_arguments_are_named(rng):
    kv, norm, cos, sin, positions = inputs(rng, 4, np.float32)
    ring, slots = jax.tree.map(jnp.asarray, new_ring(2, 128)), np.zeros(4, np.int32)

    def call(kv=kv, norm=norm, cos=cos, **options):
        window = RawWindow(*map(jnp.asarray, (kv, norm, cos, sin)))
        tokens = StepTokens(*map(jnp.asarray, (slots, positions)))
        return append_swa_fused(ring, window, tokens, eps=EPS, **options)

    with pytest.raises(ValueError, match=r"got norm \(511,\); expected \(512,\)"):
        call(norm=norm[1:])
    with pytest.raises(ValueError, match=r"got cos \(3, 32\); expected \(4, 32\)"):
        call(cos=cos[1:])
    with pytest.raises(TypeError, match="got cos bfloat16; expected float32"):
        call(cos=cos.astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="got implementation 'tpu'"):
        call(implementation="tpu")
    with pytest.raises(ValueError, match="got layer 0 with a ring that is not stacked"):
        call(layer=0)
