"""write_layer: one operation for all that a layer writes in a decode step, against the three it is made of."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_cases import (
    BF16,
    CSA,
    CSA_UE8M0,
    EPS,
    HCA,
    HCA_UE8M0,
    MXFP4,
    NVFP4,
    RUNNING,
    new_state,
    new_weights,
    poisoned,
)

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.segments import Segments, StepTokens, one_token_segments
from dsv4_jax.ops.write.append_swa import SWARing
from dsv4_jax.ops.write.append_swa_fused import RawWindow, append_swa_fused
from dsv4_jax.ops.write.compress import Projections, compress, compress_indexer
from dsv4_jax.ops.write.write_layer import LayerInputs, LayerState, write_layer

SLOTS, LAYERS = 5, 2
LAYERS_OF = {
    "csa": (CSA, NVFP4, np.float32),
    "hca": (HCA, None, BF16),
    "csa_ue8m0": (CSA_UE8M0, MXFP4, BF16),
    "hca_ue8m0": (HCA_UE8M0, None, np.float32),
    "hca_running": (RUNNING, None, np.float32),
}
# The jax.numpy form takes long to compile; a CSA layer has all that there is.
CASES = (
    [pytest.param(("jnp", "cpu"), *kind, id=f"jnp-cpu-{name}") for name, kind in [*LAYERS_OF.items()][:1]]
    + [pytest.param(("cpu", "cpu"), *kind, id=f"native-cpu-{name}") for name, kind in LAYERS_OF.items()]
    + [
        pytest.param(
            ("cuda", "gpu"), *kind[:2], dtype, id=f"native-gpu-{name}-{np.dtype(dtype)}", marks=pytest.mark.gpu
        )
        for name, kind in LAYERS_OF.items()
        for dtype in (np.float32, BF16)
    ]
)


def new_layer(rng, entries, keys):
    """Arrays of poison, full tails, a table, and the compressors' weights."""
    shape = (LAYERS, SLOTS, 128)
    scale = poisoned((*shape, entries.scales), np.uint8) if entries.scales else poisoned(shape, "f4")
    ring = SWARing(
        poisoned((*shape, 448), np.uint8), poisoned((*shape, 64), BF16), scale,
        np.full(shape, -1, np.int32), np.full(shape[:2], 99, np.int32),
    )  # fmt: skip
    parts = [new_state(rng, g, layers=LAYERS, slots=SLOTS) if g else None for g in (entries, keys)]
    # One table for both kinds of blocks, with one column that nobody gave out.
    table = parts[0].table
    table[1, 1] = -1
    state = LayerState(ring, *parts[0][:2], *(parts[1][:2] if keys else (None, None)))
    tails = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), (state.tail, state.keys_tail))
    state = state._replace(tail=tails[0], keys_tail=tails[1])
    return state, table, [new_weights(rng, g) if g else None for g in (entries, keys)]


def new_inputs(rng, entries, keys, weights, positions, dtype):
    """Projections of a token of each slot, in any order, and of a padding token."""
    slots = rng.permutation(SLOTS + 1).astype(np.int32) - 1
    at = np.where(slots < 0, 77, positions[slots]).astype(np.int32)

    def tokens(width):
        return jnp.asarray((2 * rng.standard_normal((len(slots), width))).astype(dtype))

    angles = at[:, None].astype(np.float32) * np.asarray(weights[0].inv_freq)
    window = RawWindow(
        tokens(512), jnp.asarray(1 + 0.1 * rng.standard_normal(512), jnp.float32), np.cos(angles), np.sin(angles)
    )
    parts = [
        Projections(tokens(g.lanes * g.dim), tokens(g.lanes * g.dim), w) if g else None
        for g, w in zip((entries, keys), weights, strict=True)
    ]
    return (window, *parts, jnp.asarray(slots), jnp.asarray(at))


@functools.partial(jax.jit, static_argnames=("format", "implementation"), donate_argnums=0)
def at_once(state, window, compressor, indexer, slots, positions, table, **options):
    tokens = StepTokens(slots, positions, one_token_segments(slots, positions), table)
    return write_layer(state, LayerInputs(window, compressor, indexer), tokens, layer=1, eps=EPS, **options)


@functools.partial(jax.jit, static_argnames=("format", "implementation"), donate_argnums=0)
def one_by_one(state, window, compressor, indexer, slots, positions, table, format, implementation):
    options = {"layer": 1, "eps": EPS, "implementation": implementation}
    tokens = StepTokens(slots, positions, one_token_segments(slots, positions), table)
    ring = append_swa_fused(state.ring, window, tokens, **options)
    entries = compress(state.entries, state.tail, compressor, tokens, **options)
    keys = state.keys, state.keys_tail
    if indexer is not None:
        keys = compress_indexer(*keys, indexer, tokens, format=format, **options)
    return LayerState(ring, *entries, *keys)


def assert_same_bits(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        integer = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
        np.testing.assert_array_equal(np.asarray(a).view(integer), np.asarray(b).view(integer))


@pytest.mark.parametrize(("implementation", "entries", "keys", "dtype"), CASES)
def test_what_is_stored_is_what_the_three_operations_store(rng, implementation, entries, keys, dtype):
    implementation, platform = implementation
    if implementation != "jnp" and implementation not in dispatch.available():
        pytest.skip(f"no native library for {implementation}")
    with jax.default_device(jax.devices(platform)[0]):
        check_bits(rng, implementation, entries, keys, dtype)


def check_bits(rng, implementation, entries, keys, dtype):
    before, table, weights = new_layer(rng, entries, keys)
    format = keys and keys.key_format
    states = [jax.tree.map(jnp.asarray, before) for _ in range(2)]
    # Windows close at 127 and 255; those of slot 1 belong in the block that was not given out.
    first = np.array([123, 250, 125, 0, 252])
    for i in range(6):
        inputs = new_inputs(rng, entries, keys, weights, first + i, dtype)
        states[0] = at_once(states[0], *inputs, table, format=format, implementation=implementation)
        states[1] = one_by_one(states[1], *inputs, table, format=format, implementation=implementation)
    assert_same_bits(states[0], states[1])
    changed = jax.tree.map(lambda a, b: np.count_nonzero(np.asarray(a)[1] != np.asarray(b)[1]), states[0], before)
    assert all(n > 0 for n in jax.tree.leaves(changed)), changed
    assert changed.entries.nope > 400
    assert_same_bits(jax.tree.map(lambda x: x[0], states[0]), jax.tree.map(lambda x: x[0], before))


@pytest.mark.optimised
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_it_is_one_call_and_in_place(rng, kind, platform):
    if platform not in dispatch.available():
        pytest.skip(f"no native library for {platform}")
    entries, keys, _ = LAYERS_OF[kind]
    state, table, weights = new_layer(rng, entries, keys)
    with jax.default_device(jax.devices("gpu" if platform == "cuda" else "cpu")[0]):
        state = jax.tree.map(jnp.asarray, state)
        inputs = new_inputs(rng, entries, keys, weights, np.zeros(SLOTS, int), np.float32)
        options = {"format": keys and keys.key_format, "implementation": None}
        compiled = at_once.lower(state, *inputs, table, **options).compile()
    assert re.findall(r'custom_call_target="(dsv4_\w+)"', compiled.as_text()) == ["dsv4_write_layer"]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < 100_000


def test_projections_of_different_dtypes(rng):
    before, table, weights = new_layer(rng, CSA, NVFP4)
    inputs = new_inputs(rng, CSA, NVFP4, weights, np.full(SLOTS, 3), BF16)
    mixed = (inputs[0]._replace(kv=inputs[0].kv.astype(jnp.float32)), *inputs[1:])
    got, expected = (
        at_once(jax.tree.map(jnp.asarray, before), *x, table, format="nvfp4", implementation=None)
        for x in (mixed, inputs)
    )
    assert_same_bits(got, expected)


def test_a_layer_without_compressor_is_the_fused_append(rng):
    state, _, weights = new_layer(rng, CSA, None)
    state = LayerState(jax.tree.map(jnp.asarray, state.ring))
    window, _, _, *where = new_inputs(rng, CSA, None, weights, np.arange(SLOTS), np.float32)
    tokens = StepTokens(*where, one_token_segments(*where))
    got = write_layer(state, LayerInputs(window), tokens, layer=1, eps=EPS)
    expected = append_swa_fused(state.ring, window, tokens, layer=1, eps=EPS)
    assert_same_bits(got, LayerState(expected))


def test_wrong_arguments_are_named(rng):
    state, table, weights = new_layer(rng, CSA, NVFP4)
    state = jax.tree.map(jnp.asarray, state)
    window, compressor, indexer, *where = new_inputs(rng, CSA, NVFP4, weights, np.zeros(SLOTS, int), np.float32)
    segments = one_token_segments(*where)

    def call(state=state, compressor=compressor, indexer=indexer, segments=segments, layer=1, **options):
        given, tokens = LayerInputs(window, compressor, indexer), StepTokens(*where, segments, jnp.asarray(table))
        write_layer(state, given, tokens, layer=layer, eps=EPS, format="nvfp4", **options)

    with pytest.raises(ValueError, match=r"got it for state\.keys; expected None in an HCA layer"):
        call(indexer=None)
    with pytest.raises(ValueError, match=r"got None for state\.tail; expected it in a CSA layer"):
        call(state=state._replace(tail=None))
    with pytest.raises(ValueError, match="got None for compressor; expected it in a CSA layer"):
        call(compressor=None)
    with pytest.raises(ValueError, match="got segments of up to 3 tokens; expected one token of a slot"):
        call(segments=Segments(*segments[:3], jnp.zeros((2, 3), jnp.int32), segments.rows))
    with pytest.raises(ValueError, match="got layer 2; expected 0 to 1"):
        call(layer=2)
    with pytest.raises(ValueError, match="got implementation 'tpu'"):
        call(implementation="tpu")
