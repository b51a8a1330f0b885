"""append_swa: one suite for every implementation, against a plain loop in numpy."""

import functools
import logging
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from forms import form_of_operation
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.fp8 import quantise_fp8, to_bf16
from dsv4_jax.ops.formats.ue8m0 import quantise_ue8m0
from dsv4_jax.ops.write.append_swa import SWARing, append_swa, resolve_writes
from dsv4_jax.ops.write.rows import set_rows

BF16 = ml_dtypes.bfloat16
MANY = 700
INT_MAX, INT_MIN = np.int32(2**31 - 1), np.int32(-(2**31))

# (implementation, device): the jax.numpy form must store the same bits on a GPU as on a CPU.
IMPLEMENTATIONS = [
    pytest.param(("jnp", "cpu"), id="jnp-cpu"),
    pytest.param(("cpu", "cpu"), id="native-cpu"),
    pytest.param((None, "cpu"), id="automatic-cpu"),
    pytest.param(("jnp", "gpu"), id="jnp-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "gpu"), id="native-gpu", marks=pytest.mark.gpu),
    pytest.param((None, "gpu"), id="automatic-gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with form_of_operation(*request.param) as name:
        yield name


@functools.partial(
    jax.jit, static_argnames=("layer", "one_token_per_slot", "implementation"), donate_argnames=("ring",)
)
def append(ring, kv, slots, positions, **options):
    return append_swa(ring, kv, slots, positions, **options)


round_to_bf16 = jax.jit(to_bf16)


def bits(x):
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


def new_ring(slots, rows, *, layers=None, nope=448, rope=64, dtype="uint8"):
    """A ring as numpy arrays, filled with what nobody would write; dtype "ue8m0": a scale for every 64 values."""
    shape = (slots, rows) if layers is None else (layers, slots, rows)
    exact = dtype == "float32"
    scale = {"uint8": np.full(shape, -5, np.float32), "ue8m0": np.full((*shape, 8), 0x33, np.uint8)}.get(dtype)
    dtype = "uint8" if dtype == "ue8m0" else dtype
    return SWARing(
        nope=np.full((*shape, nope), 0x55 if dtype == "uint8" else -3, jnp.dtype(dtype)),
        rope=np.full((*shape, rope), -7, np.float32 if exact else BF16),
        inv_scale=scale,
        pos=np.full(shape, -1, np.int32),
        head=np.full(shape[:-1], 99, np.int32),
    )


def expected_ring(ring, kv, slots, positions, layer=None):
    """What the contract says, token by token."""
    ring = jax.tree.map(np.array, ring)
    one = ring if layer is None else jax.tree.map(lambda a: a[layer], ring)
    num_slots, num_rows, width = one.nope.shape
    tokens = [(int(s), int(p), t) for t, (s, p) in enumerate(zip(slots, positions, strict=True))]
    tokens = [(s, p, t) for s, p, t in tokens if 0 <= s < num_slots and p >= 0]
    newest = {}
    for s, p, _ in tokens:
        newest[s] = max(p, newest.get(s, -1))
    record = to_record(kv, width, one)
    for s, p, t in tokens:
        if p > newest[s] - num_rows:
            for array, values in zip(one[:3], record, strict=True):
                if array is not None:
                    array[s, p % num_rows] = values[t]
            one.pos[s, p % num_rows] = p
    for s, p in newest.items():
        one.head[s] = (p + 1) % num_rows
    return ring


def to_record(kv, width, one):
    """Quantised rows; the quantisation itself is tested in test_fp8."""
    nope, rope = np.asarray(kv)[:, :width], np.asarray(kv)[:, width:]
    if one.nope.dtype == np.uint8:
        nope, inv_scale = jax.jit(quantise_ue8m0 if one.inv_scale.dtype == np.uint8 else quantise_fp8)(nope)
        return np.asarray(nope), np.asarray(round_to_bf16(rope)), np.asarray(inv_scale)
    if one.nope.dtype == BF16:
        return np.asarray(round_to_bf16(nope)), np.asarray(round_to_bf16(rope)), None
    return np.asarray(nope, np.float32), np.asarray(rope, np.float32), None


def assert_same_bits(got, expected):
    for name, a, b in zip(SWARing._fields, got, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)


def check(ring, kv, slots, positions, layer=None, **options):
    slots, positions = np.asarray(slots, np.int32), np.asarray(positions, np.int32)
    expected = expected_ring(ring, kv, slots, positions, layer)
    got = append(jax.tree.map(jnp.asarray, ring), jnp.asarray(kv), slots, positions, layer=layer, **options)
    assert_same_bits(got, expected)
    return jax.tree.map(np.asarray, got)


def check_padded(ring, kv, slots, positions, **options):
    """As `check`, with padding up to MANY tokens, so that one program serves many tests."""
    padding = MANY - len(kv)
    kv = np.concatenate([kv, np.zeros((padding, kv.shape[1]), kv.dtype)])
    slots, positions = (np.concatenate([x, np.full(padding, fill)]) for x, fill in ((slots, -1), (positions, 7)))
    return check(ring, kv, slots, positions, **options)


def normal(rng, tokens, width=512, dtype=np.float32):
    return (rng.standard_normal((tokens, width)) * 2.0 ** rng.integers(-20, 20, (tokens, 1))).astype(dtype)


@pytest.mark.optimised
@pytest.mark.parametrize("form", ["uint8", "ue8m0"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_any_mix_of_slots_positions_and_padding(implementation, rng, dtype, form):
    tokens = MANY  # 5 slots of up to 128 rows: many positions fall out of the window, some come twice
    slots = rng.integers(-2, 7, tokens)
    positions = rng.integers(-3, 300, tokens)
    slots[:4], positions[4:7] = [INT_MAX, INT_MIN, 5, -1], [INT_MAX, INT_MIN, -1]
    positions[slots == 3] = INT_MAX - rng.integers(0, 200, np.sum(slots == 3))
    ring = new_ring(5, 128, dtype=form)
    check(ring, normal(rng, tokens, dtype=dtype), slots, positions, implementation=implementation)


def test_more_tokens_of_one_slot_than_rows_keep_the_last_in_any_order(implementation, rng):
    kv = normal(rng, 300)
    order = rng.permutation(300)
    ring = check_padded(new_ring(5, 128), kv[order], np.ones(300), order + 50, implementation=implementation)
    assert sorted(ring.pos[1]) == list(range(222, 350))
    assert ring.head.tolist() == [99, 350 % 128, 99, 99, 99]
    assert (ring.pos[0] == -1).all()


def test_decode_steps_wrap_around_the_ring(implementation, rng):
    ring = new_ring(3, 128)
    for step in range(126, 132):
        slots, positions = np.array([2, 0, -1]), np.array([step, 5 * step, 7])
        ring = check(ring, normal(rng, 3), slots, positions, one_token_per_slot=True, implementation=implementation)
    assert ring.head[2] == 132 % 128


def test_the_later_of_two_tokens_with_one_position_is_stored(implementation, rng):
    kv = normal(rng, 4)
    check_padded(new_ring(5, 128), kv, [0, 0, 0, 0], [7, 8, 7, 8], implementation=implementation)


def test_going_back_moves_the_head_back(implementation, rng):
    ring = check_padded(new_ring(5, 128), normal(rng, 20), np.zeros(20), np.arange(20), implementation=implementation)
    assert check_padded(ring, normal(rng, 1), [0], [11], implementation=implementation).head[0] == 12


def test_only_the_given_layer_of_a_stack_is_written(implementation, rng):
    ring = new_ring(4, 128, layers=3)
    for layer in (2, 0):
        kv, slots, positions = normal(rng, 40), rng.integers(-1, 4, 40), rng.integers(0, 500, 40)
        ring = check(ring, kv, slots, positions, layer=layer, implementation=implementation)
    assert (ring.pos[1] == -1).all()


@pytest.mark.parametrize("rows", [1, 7, 128, 160])
def test_number_of_rows_is_data(implementation, rng, rows):
    slots, positions = rng.integers(0, 3, 60), rng.integers(0, 400, 60)
    check(new_ring(3, rows), normal(rng, 60), slots, positions, implementation=implementation)


@pytest.mark.optimised
@pytest.mark.parametrize("form", ["uint8", "ue8m0"])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_values_no_rule_should_forget(implementation, rng, dtype, form):
    kv = normal(rng, 12)
    kv[0, 447], kv[1, 0], kv[2, 100] = np.nan, np.inf, -np.inf
    kv[3, 448], kv[3, 449], kv[3, 511] = np.nan, -np.inf, np.inf  # RoPE values round each by itself
    kv[4] = 0.0
    kv[5] = -0.0
    kv[6, ::2], kv[6, 1::2] = 1e-39, -1e-41  # denormals
    kv[7, ::3] = 3.3e38
    kv[8] *= 1e-30
    kv[9] = rng.integers(-448, 449, 512) / 64  # midpoints of codes: amax is 7
    kv[9, 0] = 7
    kv = kv.astype(dtype)
    kv.view(np.uint16 if dtype == BF16 else np.uint32)[10, [3, 460]] = 0xFFFF if dtype == BF16 else 0xFF800001
    kv[11, 64:130] = 448 * 2.0 ** np.arange(-33, 33)  # where a power of two is just enough
    ring = check_padded(new_ring(5, 128, dtype=form), kv, np.zeros(12), np.arange(12), implementation=implementation)
    nan = np.isnan(ring.inv_scale) if form == "uint8" else np.any(ring.inv_scale == 0xFF, axis=-1)
    assert nan[0, :12].tolist() == [True] * 3 + [False] * 7 + [True, False]
    assert bits(ring.rope)[0, 10, 12] == 0x7FC0


def test_many_tokens(implementation, rng):
    slots, positions = rng.integers(-1, 64, 6000), rng.integers(0, 160, 6000)
    check(new_ring(64, 128), normal(rng, 6000), slots, positions, implementation=implementation)


def test_no_tokens(implementation):
    check(new_ring(2, 128), np.zeros((0, 512), np.float32), [], [], implementation=implementation)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_dtype", [np.float32, BF16])
@pytest.mark.parametrize("implementation", ["jnp", None])
def test_records_that_are_not_quantised(implementation, rng, dtype, kv_dtype):
    slots, positions = rng.integers(-1, 3, 90), rng.integers(0, 400, 90)
    kv = normal(rng, 90, 48, kv_dtype)
    kv[5, [1, 40]] = np.nan, -0.0
    ring = new_ring(3, 32, layers=2, nope=40, rope=8, dtype=dtype)
    check(ring, kv, slots, positions, layer=1, implementation=implementation)


@pytest.mark.parametrize("implementation", ["jnp", "cpu", None])
def test_other_widths(implementation, rng):
    if implementation == "cpu" and "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    slots, positions = rng.integers(-1, 3, 90), rng.integers(0, 400, 90)
    with jax.default_device(jax.devices("cpu")[0] if implementation == "cpu" else None):
        check(new_ring(3, 32, nope=33, rope=6), normal(rng, 90, 39), slots, positions, implementation=implementation)


@given(st.lists(st.tuples(st.integers(-2, 4), st.integers(-2, 12)), min_size=12, max_size=12), st.randoms())
def test_roles_follow_the_contract_in_any_order(tokens, random):
    def written(tokens):
        slots, positions = np.array(tokens, np.int32).T
        roles = jax.jit(resolve_writes, static_argnums=(2, 3))(slots, positions, 3, 5)
        return [(role, *token) for role, token in zip(np.asarray(roles).tolist(), tokens, strict=True)]

    roles = written(tokens)
    valid = [(s, p) for s, p in tokens if 0 <= s < 3 and p >= 0]
    newest = {s: max(p for t, p in valid if t == s) for s, _ in valid}
    expected = {(1 + (p == newest[s]), s, p) for s, p in valid if p > newest[s] - 5}
    stored = [entry for entry in roles if entry[0]]
    assert len(stored) == len(set(stored))
    assert set(stored) == expected
    for role, s, p in stored:  # the last of equal tokens
        assert roles[::-1].index((role, s, p)) <= tokens[::-1].index((s, p))
    random.shuffle(tokens)
    assert {entry for entry in written(tokens) if entry[0]} == expected


# The update is in place.


def compiled_append(dtype, implementation, tokens=2, layers=8, slots=8):
    """A step of all layers: each writes, then reads its window, and the next layer's tokens depend on what was read."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(ring, kv, slots, positions):
        for layer in range(layers):
            ring = append_swa(ring, kv, slots, positions, layer=layer, implementation=implementation)
            for array in jax.tree.leaves(ring):
                read = array[layer, slots].astype(kv.dtype).reshape(kv.shape[0], -1)
                kv = kv + jnp.sum(read, axis=-1, keepdims=True)
        return ring, kv

    ring = jax.tree.map(jnp.asarray, new_ring(slots, 128, layers=layers, dtype=dtype))
    args = (ring, jnp.zeros((tokens, 512), jnp.bfloat16), jnp.zeros(tokens, jnp.int32), jnp.zeros(tokens, jnp.int32))
    return ring, step.lower(*args).compile()


def assert_in_place(ring, compiled):
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(array.nbytes for array in jax.tree.leaves(ring))
    assert memory.temp_size_in_bytes < ring.rope.nbytes  # what one layer reads, in float32
    names = {"uint8": "u8", "bfloat16": "bf16", "float32": "f32", "int32": "s32"}
    arrays = {(names[array.dtype.name], ",".join(map(str, array.shape))) for array in jax.tree.leaves(ring)}
    entry = compiled.as_text().split("\nENTRY ")[1]
    made = re.findall(r" = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", entry)
    assert made
    for dtype, shape, operation in made:
        if shape in {s for _, s in arrays}:
            assert (dtype, shape) in arrays
            assert not operation.startswith("copy")


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_a_donated_stack_is_updated_in_place(dtype):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu: XLA copies bfloat16 arrays to scatter into them")
    with jax.default_device(jax.devices("cpu")[0]):
        assert_in_place(*compiled_append(dtype, None))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cuda", "jnp", None])
def test_a_donated_stack_is_updated_in_place_on_the_gpu(implementation):
    assert_in_place(*compiled_append("uint8", implementation))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_donated_stack_of_exact_records_is_updated_in_place_on_the_gpu(dtype):
    assert_in_place(*compiled_append(dtype, None))


def test_steps_are_not_compiled_again(rng):
    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(ring, kv, slots, positions):
        return append_swa(ring, kv, slots, positions, layer=1)

    ring = jax.tree.map(jnp.asarray, new_ring(2, 128, layers=2))
    for position in range(3):
        ring = step(ring, jnp.ones((2, 512)), jnp.arange(2, dtype=jnp.int32), jnp.full(2, position, jnp.int32))
    assert ring.head.tolist() == [[99, 99], [3, 3]]


# Mistakes end in one clear sentence.


def arguments(**changes):
    base = {"kv": jnp.zeros((4, 512)), "slots": jnp.zeros(4, jnp.int32), "positions": jnp.zeros(4, jnp.int32)}
    return base | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv": jnp.zeros((4, 511))}, ValueError, r"got kv \(4, 511\); expected \(4, 512\)"),
        ({"kv": jnp.zeros(512)}, ValueError, r"got kv \(512,\); expected"),
        ({"kv": jnp.zeros((4, 512), jnp.float16)}, TypeError, "got kv float16; expected float32 or bfloat16"),
        ({"slots": jnp.zeros(3, jnp.int32)}, ValueError, r"got slots \(3,\); expected \(4,\)"),
        ({"slots": jnp.zeros(4, jnp.uint32)}, TypeError, "got slots uint32; expected int32"),
        ({"positions": jnp.zeros((4, 1), jnp.int32)}, ValueError, r"got positions \(4, 1\); expected \(4,\)"),
        ({"positions": jnp.zeros(4)}, TypeError, "got positions float32; expected int32"),
        ({"layer": 0}, ValueError, "got layer 0 with a ring that is not stacked"),
        ({"implementation": "tpu"}, ValueError, "got implementation 'tpu'; expected None, 'jnp', 'cpu' or 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    ring = jax.tree.map(jnp.asarray, new_ring(2, 128))
    with pytest.raises(error, match=message):
        append_swa(ring, **arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nope": np.zeros((2, 448), np.uint8)}, ValueError, r"got ring.nope \(2, 448\); expected \(\[layers,\] slots"),
        ({"nope": np.zeros((2, 128, 448), np.int8)}, TypeError, "got ring.nope int8; expected uint8, bfloat16 or"),
        ({"rope": np.zeros((2, 64, 64), BF16)}, ValueError, r"got ring.rope \(2, 64, 64\); expected \(2, 128, 64\)"),
        ({"rope": np.zeros((2, 128, 64), np.float32)}, TypeError, "got ring.rope float32; expected bfloat16"),
        ({"pos": np.zeros((2, 127), np.int32)}, ValueError, r"got ring.pos \(2, 127\); expected \(2, 128\)"),
        ({"head": np.zeros(2, np.uint32)}, TypeError, "got ring.head uint32; expected int32"),
        ({"inv_scale": None}, ValueError, "got ring.inv_scale None with ring.nope uint8"),
        ({"inv_scale": np.zeros((2, 128), BF16)}, TypeError, "got ring.inv_scale bfloat16; expected float32"),
        ({"nope": np.zeros((2, 128, 448), BF16)}, ValueError, "got ring.inv_scale given with ring.nope bfloat16"),
    ],
)
def test_wrong_rings_are_named(changes, error, message):
    ring = jax.tree.map(jnp.asarray, new_ring(2, 128)._replace(**changes))
    with pytest.raises(error, match=message):
        append_swa(ring, **arguments())


@pytest.mark.parametrize(("layer", "message"), [(None, "stacked over 3 layers; give layer"), (3, "got layer 3; exp")])
def test_wrong_layers_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        append_swa(jax.tree.map(jnp.asarray, new_ring(2, 128, layers=3)), **arguments(), layer=layer)


@pytest.mark.parametrize(("nope", "rope", "native_form"), [(448, 64, True), (32, 16, False)])
def test_widths_that_the_gpu_form_does_not_serve_fall_back(monkeypatch, nope, rope, native_form):
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({"cuda"}))
    monkeypatch.setattr(dispatch, "platforms", lambda: frozenset({"cpu", "cuda"}))
    ring = jax.tree.map(jnp.asarray, new_ring(2, 8, nope=nope, rope=rope))
    program = jax.make_jaxpr(append_swa)(ring, jnp.zeros((4, nope + rope)), *[jnp.zeros(4, jnp.int32)] * 2)
    assert ("dsv4_append_swa" in str(program)) == native_form


def test_an_implementation_that_cannot_serve_the_ring_is_refused_by_name(monkeypatch):
    exact = jax.tree.map(jnp.asarray, new_ring(2, 128, dtype="bfloat16"))
    narrow = jax.tree.map(jnp.asarray, new_ring(2, 128, nope=40, rope=8))
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({"cpu", "cuda"}))
    with pytest.raises(ValueError, match=r"'cpu' cannot be used: it stores only FP8 records .* not bfloat16"):
        append_swa(exact, **arguments(), implementation="cpu")
    with pytest.raises(
        ValueError, match=r"'cuda' cannot be used: it supports only records of 448 \+ 64 values, not 40"
    ):
        append_swa(narrow, **arguments(kv=jnp.zeros((4, 48))), implementation="cuda")
    monkeypatch.setattr(dispatch, "available", frozenset)
    with pytest.raises(ValueError, match="'cuda' cannot be used: the native library for 'cuda' is not installed"):
        append_swa(exact, **arguments(), implementation="cuda")


@pytest.mark.parametrize(
    ("changes", "layer", "message"),
    [
        ({"pos": np.zeros((2, 127), np.int32)}, -1, r"append_swa: got pos \(2, 127\); expected \(2, 128\)"),
        ({"head": np.zeros(2, np.float32)}, -1, "append_swa: got head of another dtype; expected int32"),
        ({"nope": np.zeros((2, 448), np.uint8)}, -1, r"append_swa: got nope \(2, 448\); expected \(\[layers,\]"),
        ({}, 1, r"append_swa: got layer 1 for nope \(2, 128, 448\); expected one of its layers"),
    ],
)
def test_the_handler_checks_what_it_gets(changes, layer, message):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    ring = new_ring(2, 128)._replace(**changes)
    call = jax.ffi.ffi_call(
        "dsv4_append_swa",
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ring),
        input_output_aliases={i: i for i in range(5)},
    )
    tokens = np.zeros(4, np.int32)
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            call(*ring, np.zeros((4, 512), np.float32), tokens, tokens, tokens, layer=np.int64(layer))
        )


# set_rows and the library itself.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.uint8])
def test_set_rows_is_a_scatter_that_drops_what_is_outside(rng, dtype):
    array = rng.integers(0, 100, (3, 5, 7, 4)).astype(dtype)
    i = np.array([0, 4, 2, -1, 5, 3], np.int32)
    j = np.array([6, 0, 7, 1, 1, -2], np.int32)
    values = rng.integers(0, 100, (6, 4)).astype(dtype)
    expected = array.copy()
    expected[2, 0, 6], expected[2, 4, 0] = values[0], values[1]

    def step(array, i, j, values):
        return set_rows(array, (2, i, j), values)

    for f in (step, jax.jit(step, donate_argnums=0)):
        got = f(jnp.asarray(array), i, j, jnp.asarray(values))
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), expected.astype(np.float32))


def test_set_rows_names_wrong_arguments():
    array, index = jnp.zeros((3, 4, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(TypeError, match="got values bfloat16; expected float32 like the array"):
        set_rows(array, (0, index), jnp.zeros((2, 8), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"got values \(2, 7\); expected \(T, \(8,\)\)"):
        set_rows(array, (0, index), jnp.zeros((2, 7)))
    with pytest.raises(TypeError, match="got index 1 float32; expected int32"):
        set_rows(array, (0, jnp.zeros(2)), jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match=r"got index 1 \(3,\); expected \(2,\)"):
        set_rows(array, (0, jnp.zeros(3, jnp.int32)), jnp.zeros((2, 8)))


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_usable_library_everything_runs_in_jax_numpy_and_it_is_said_once(
    content, tmp_path, monkeypatch, caplog, rng
):
    if content is not None:
        (tmp_path / "libdsv4_jax_cpu.so").write_bytes(content)
    monkeypatch.setenv(dispatch.LIBRARY_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(dispatch, "available", functools.cache(dispatch.available.__wrapped__))
    kv, slots, positions = normal(rng, 5, 48), np.zeros(5, np.int32), np.arange(5, dtype=np.int32)
    fresh = jax.jit(lambda *arguments: append_swa(*arguments))  # traced with this library, not with an earlier one
    with caplog.at_level(logging.WARNING):
        for dtype in ("uint8", "bfloat16"):
            ring = new_ring(2, 16, nope=40, rope=8, dtype=dtype)
            got = fresh(jax.tree.map(jnp.asarray, ring), jnp.asarray(kv), slots, positions)
            assert_same_bits(got, expected_ring(ring, kv, slots, positions))
    said = [record.message for record in caplog.records if "runs in plain jax.numpy" in record.message]
    assert len(said) == 1
    assert str(tmp_path) in said[0]
    assert dispatch.available() == frozenset()
