"""read_window, read_entries and read_keys: one suite for every implementation, against plain readings in numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.read.entries import read_entries, read_keys
from dsv4_jax.ops.read.window import read_window
from dsv4_jax.ops.write.append_swa import SWARing
from dsv4_jax.ops.write.compress import IndexerKeys

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
INT_MAX = np.int32(2**31 - 1)
LAYERS, LAYER = 2, 1


window_of = jax.jit(read_window, static_argnames=("layer", "window", "dtype", "implementation"))
entries_of = jax.jit(read_entries, static_argnames=("layer", "max_blocks", "dtype", "implementation"))
keys_of = jax.jit(read_keys, static_argnames=("layer", "max_blocks", "format", "implementation"))


def new_records(rng, *shape, form="fp8", nope=448, rope=64):
    """Every code, NaN too; scales as they arise, and some NaN."""
    codes = rng.integers(0, 256, (*shape, nope)).astype(np.uint8)
    plain = rng.standard_normal((*shape, rope)).astype(BF16)
    plain[..., 0] = -0.0
    if form == "fp8":
        scale = (2.0 ** rng.uniform(-20, 60, shape)).astype(np.float32)
        scale[rng.random(shape) < 0.1] = np.nan
    else:
        scale = rng.integers(105, 248, (*shape, -(-nope // 512) * 8)).astype(np.uint8)
        scale[rng.random(scale.shape) < 0.05] = 0xFF
    return Record(codes, plain, scale)


def decoded(record, dtype):
    """What a reading of the format says, (..., nope + rope)."""
    codes = record.nope.view(E4M3).astype(np.float32)
    scale = record.inv_scale
    if scale.dtype == np.uint8:
        value = np.where(scale == 0xFF, np.nan, 2.0 ** (scale.astype(np.float64) - 127)).astype(np.float32)
        scale = np.repeat(value[..., : codes.shape[-1] // 64], 64, axis=-1)
    else:
        scale = scale[..., None]
    with np.errstate(over="ignore"):  # 448 * 2^120
        return np.concatenate([codes * scale, record.rope.astype(np.float32)], axis=-1).astype(dtype)


def assert_same(got, expected):
    """The same bits, but for those of a NaN."""
    got = np.asarray(got)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    bits = {2: np.uint16, 4: np.uint32}[got.itemsize]
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize(("rows", "window"), [(128, 128), (37, 30)])
def test_window(implementation, rng, rows, window, form, dtype):
    slots = np.array([2, 0, -1, 1, 3, 5, 4, 3], np.int32)
    newest = np.array([700, rows - 1, 50, -1, INT_MAX, 9, 0, 29], np.int32)
    record = new_records(rng, LAYERS, 5, rows, form=form)
    ring = SWARing(*record, pos=np.zeros((LAYERS, 5, rows), np.int32), head=np.zeros((LAYERS, 5), np.int32))
    kv, positions = window_of(
        jax.tree.map(jnp.asarray, ring), slots, newest, layer=LAYER, window=window, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip
    values = decoded(record, dtype)[LAYER]
    expected, where = np.zeros((8, rows, 512), dtype), np.full((8, rows), -1)
    for s, (slot, last) in enumerate(zip(slots.tolist(), newest.tolist(), strict=True)):
        for p in range(max(0, last - window + 1), last + 1) if 0 <= slot < 5 else ():
            expected[s, p % rows], where[s, p % rows] = values[slot, p % rows], p
    np.testing.assert_array_equal(positions, where)
    assert_same(kv, expected)


def new_table(rng, slots, columns, blocks):
    """Distinct blocks in any order; some columns have none."""
    table = rng.permutation(blocks)[: slots * columns].reshape(slots, columns).astype(np.int32)
    table[rng.random(table.shape) < 0.2] = -1
    return table


def place(table, slot, entry, per_block, count):
    """(block, offset) of an entry that may be read, or None."""
    column = entry // per_block
    if not (0 <= slot < len(table) and 0 <= entry < count and column < table.shape[1]) or table[slot, column] < 0:
        return None
    return table[slot, column], entry % per_block


def expected_entries(values, table, slots, counts, selected):
    out = np.zeros((*selected.shape, values.shape[-1]), values.dtype)
    for s, slot in enumerate(slots):
        for k, entry in enumerate(selected[s].tolist()):
            where = place(table, slot, entry, values.shape[1], counts[s])
            if where is not None:
                out[s, k] = values[where]
    return out


SLOTS, COUNTS = np.array([3, -1, 0, 1, 4, 2], np.int32), np.array([60, 80, 0, 1, 70, 96], np.int32)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("per_block", [32, 1])
def test_entries(implementation, rng, per_block, form, dtype):
    columns = 96 // per_block
    blocks = 4 * columns + 3
    record, table = new_records(rng, LAYERS, blocks, per_block, form=form), new_table(rng, 4, columns, blocks)
    values, pool = decoded(record, dtype)[LAYER], jax.tree.map(jnp.asarray, record)
    options = {"layer": LAYER, "dtype": dtype, "implementation": implementation}
    for max_blocks in (None, columns - 1):
        many = (max_blocks or columns) * per_block
        got = entries_of(pool, table, SLOTS, COUNTS, max_blocks=max_blocks, **options)
        all_of_them = np.tile(np.arange(many), (len(SLOTS), 1))
        assert_same(got, expected_entries(values, table, SLOTS, COUNTS, all_of_them))
    selected = rng.integers(-2, 110, (len(SLOTS), 21)).astype(np.int32)
    selected[0, :3] = INT_MAX, -(2**31), 59
    got = entries_of(pool, table, SLOTS, COUNTS, selected, **options)
    expected = expected_entries(values, table, SLOTS, COUNTS, selected)
    assert np.any(expected[0].astype(np.float32) != 0)
    assert_same(got, expected)


@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
def test_many_entries(implementation, rng, form):
    """As many as fill a GPU, of requests of different lengths."""
    record, table = new_records(rng, LAYERS, 20, 32, form=form), rng.integers(0, 20, (64, 8)).astype(np.int32)
    slots, counts = np.arange(64, dtype=np.int32)[::-1].copy(), rng.integers(0, 257, 64).astype(np.int32)
    selected = rng.integers(-1, 256, (64, 150)).astype(np.int32)
    got = entries_of(
        jax.tree.map(jnp.asarray, record), table, slots, counts, selected, layer=LAYER, dtype=BF16,
        implementation=implementation,
    )  # fmt: skip
    assert_same(got, expected_entries(decoded(record, BF16)[LAYER], table, slots, counts, selected))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("columns", [3, 90])
def test_keys(implementation, rng, columns, format):
    group = {"nvfp4": 16, "mxfp4": 32}[format]
    shape = (LAYERS, 4 * columns + 5, 32)
    codes = rng.integers(0, 256, (*shape, 64)).astype(np.uint8)
    scale = rng.integers(1, 0x80 if group == 16 else 0xFD, (*shape, 128 // group)).astype(np.uint8)
    if group == 32:  # what may arise: above 2^-24, and NaN
        scale = np.where(scale < 103, 0xFF, scale).astype(np.uint8)
    table = new_table(rng, 4, columns, shape[1])
    got = keys_of(
        IndexerKeys(jnp.asarray(codes), jnp.asarray(scale)), table, SLOTS, COUNTS * columns // 3, layer=LAYER,
        format=format, implementation=implementation,
    )  # fmt: skip
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*shape, 128)
    if group == 16:
        factor = scale.view(E4M3).astype(np.float32)
    else:
        factor = np.where(scale == 0xFF, np.nan, 2.0 ** (scale.astype(np.float64) - 127)).astype(np.float32)
    sign = np.where(nibbles > 7, np.float32(-1), np.float32(1))
    values = (sign * E2M1[nibbles & 7] * np.repeat(factor, group, axis=-1))[LAYER]
    all_of_them = np.tile(np.arange(columns * 32), (len(SLOTS), 1))
    assert_same(got, expected_entries(values, table, SLOTS, COUNTS * columns // 3, all_of_them))


@pytest.mark.parametrize("implementation", ["cpu", None])
def test_other_widths(implementation, rng):
    if implementation == "cpu" and "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    record, table = new_records(rng, LAYERS, 9, 4, nope=33, rope=6), new_table(rng, 4, 2, 9)
    slots, counts = SLOTS[:4], COUNTS[:4]
    with jax.default_device(jax.devices("cpu")[0] if implementation == "cpu" else None):
        got = read_entries(
            jax.tree.map(jnp.asarray, record), jnp.asarray(table), jnp.asarray(slots), jnp.asarray(counts), layer=LAYER,
            implementation=implementation,
        )  # fmt: skip
    all_of_them = np.tile(np.arange(8), (4, 1))
    assert_same(got, expected_entries(decoded(record, np.float32)[LAYER], table, slots, counts, all_of_them))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_exact_records_are_read_without_the_native_library(rng, dtype):
    record = Record(*(rng.standard_normal((LAYERS, 6, 4, n)).astype(dtype) for n in (40, 8)), None)
    table, slots, counts = new_table(rng, 4, 1, 6), SLOTS, COUNTS
    got = entries_of(jax.tree.map(jnp.asarray, record), table, slots, counts, layer=LAYER)
    values = np.concatenate(record[:2], axis=-1).astype(np.float32)[LAYER]
    assert_same(got, expected_entries(values, table, slots, counts, np.tile(np.arange(4), (6, 1))))
    for platform in ("cpu", "cuda"):
        if platform in dispatch.available():
            with pytest.raises(ValueError, match=rf"'{platform}' cannot be used: it reads only FP8 records \(uint8\)"):
                entries_of(record, table, slots, counts, layer=LAYER, implementation=platform)


def test_what_an_implementation_cannot_read_is_refused_by_name(rng, monkeypatch):
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({"cpu", "cuda"}))
    where = (jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
    narrow = new_records(rng, 1, 2, 4, nope=40, rope=8)
    read = functools.partial(read_entries, narrow, *where, layer=0)
    with pytest.raises(ValueError, match=r"'cuda' cannot be used: it reads only records of 448 \+ 64 values, not 40"):
        read(implementation="cuda")
    with pytest.raises(ValueError, match="it gives float32 or bfloat16, not float16"):
        read(implementation="cpu", dtype=jnp.float16)
    with pytest.raises(ValueError, match="read_entries: got implementation 'tpu'; expected None, 'jnp', 'cpu' or"):
        read(implementation="tpu")
    keys = IndexerKeys(jnp.zeros((1, 2, 4, 64)), None)
    with pytest.raises(ValueError, match=r"read_keys: .* it reads only FP4 keys, not fp32"):
        read_keys(keys, *where, layer=0, format="fp32", implementation="cpu")
    monkeypatch.setattr(dispatch, "available", frozenset)
    with pytest.raises(ValueError, match="'cpu' cannot be used: the native library for 'cpu' is not installed"):
        read(implementation="cpu")


@pytest.mark.parametrize(
    ("name", "changes", "layer", "message"),
    [
        ("window", {}, 2, "read_window: got layer 2; expected 0 to 1"),
        ("window", {1: np.zeros((2, 3, 8, 64), np.float32)}, 1, "read_window: got rope of another dtype; expected bfl"),
        ("window", {4: np.zeros(3, np.int32)}, 1, r"read_window: got newest \(3\); expected \(4\)"),
        ("entries", {3: np.zeros(3, np.int32)}, 1, "read_entries: got table or slots of another rank"),
        ("entries", {2: np.zeros((2, 3, 8, 6), np.uint8)}, 1, r"got inv_scale \(2, 3, 8, 6\); expected one for"),
        ("entries", {5: np.zeros(3, np.int32)}, 1, r"read_entries: got counts \(3\); expected \(4\)"),
    ],
)
def test_the_handler_checks_what_it_gets(rng, name, changes, layer, message):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    one = np.zeros(4, np.int32)
    where = (one, one) if name == "window" else (np.zeros((3, 1), np.int32), one, one)
    operands = [*new_records(rng, 2, 3, 8), *where]
    for i, operand in changes.items():
        operands[i] = operand
    attributes = {"layer": np.int64(layer), **({"window": np.int64(8)} if name == "window" else {})}
    call = jax.ffi.ffi_call(f"dsv4_read_{name}", jax.ShapeDtypeStruct((4, 8, 512), np.float32))
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*operands, **attributes))
