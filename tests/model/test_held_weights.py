"""Weights held as released: what the model's arrays are, what it answers, what a compiled step copies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax import DSV4Config, KVCacheManager, from_pretrained
from dsv4_jax.files.safetensors_file import open_checkpoint
from dsv4_jax.model.files.checkpoint import load_tensors, read_stored_tensors
from dsv4_jax.model.files.released_form import quantise_checkpoint
from dsv4_jax.model.files.weight_formats import scale_bytes
from dsv4_jax.model.random_weights import random_model
from dsv4_jax.model.transformer import DSV4Model
from dsv4_jax.ops import dispatch


@pytest.fixture(scope="module")
def released(tmp_path_factory, sharp):
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    quantise_checkpoint(sharp, folder)
    return folder


def arrays(model):
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.split(model)[1])}


def test_arrays_are_the_bytes_of_the_file(released):
    checkpoint, held = open_checkpoint(released), arrays(from_pretrained(released))
    assert sum(a.nbytes for a in held.values()) <= 1.02 * sum(checkpoint.info(n).nbytes for n in checkpoint)
    for name, array in held.items():
        if array.dtype != jnp.uint8:
            assert array.dtype in (jnp.bfloat16, jnp.float32, jnp.int32)
        elif ".experts." in name:
            layer, _, which = name.rpartition(".")
            matrix, _, scale = which.partition("_")
            for e in range(array.shape[0]):
                wanted = checkpoint[f"{layer}.{e}.{matrix}.{scale or 'weight'}"]
                np.testing.assert_array_equal(array[e], wanted.view(np.uint8), err_msg=name)
        else:
            np.testing.assert_array_equal(array, checkpoint[name].view(np.uint8), err_msg=name)
    codes = [name for name, array in held.items() if array.dtype == jnp.uint8 and "scale" not in name]
    assert len(codes) == 5 * 3 + 5 * 5 + 5 * 3 + 2  # stacks of experts; attention, shared experts, indexers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_converted_where_that_is_asked_for(released, dtype):
    name = {"bfloat16": "bf16", "float32": "float32"}[dtype]
    model, tensors = from_pretrained(released, weights=name), load_tensors(released, dtype=dtype)
    assert model.dtype == dtype
    for name, array in arrays(model).items():
        assert np.asarray(array).tobytes() == tensors[name].tobytes(), name
    with pytest.raises(ValueError, match="weights is 'fp8': expected None, 'bf16' or 'float32'"):
        from_pretrained(released, weights="fp8")


def test_experts_that_are_not_all_fp4_are_converted(released, rewrite):
    name = "layers.4.ffn.experts.3.w2"
    tensors, stored = load_tensors(released), dict(open_checkpoint(released))
    del stored[f"{name}.scale"]
    stored[f"{name}.weight"] = tensors["layers.4.ffn.experts.w2"][3]
    folder = rewrite(stored)
    total, read = read_stored_tensors(folder)
    found = dict(read)
    assert total == sum(array.nbytes for array in found.values())
    for matrix in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(
            found[f"layers.4.ffn.experts.{matrix}"], tensors[f"layers.4.ffn.experts.{matrix}"]
        )
        assert found[f"layers.3.ffn.experts.{matrix}"].dtype == np.uint8


def test_scales_in_float32_must_be_powers_of_two_to_stay():
    scales = np.float32([[2.0**-127, 0.25], [1.0, 2.0**100]])
    np.testing.assert_array_equal(scale_bytes("fp8", scales), [[0, 125], [127, 227]])
    for bad in (0.3, 0.0, -1.0, 2.0**-128):
        with pytest.raises(ValueError, match=r"scale \[0, 1\] is .*: expected a power of two"):
            scale_bytes("fp8", np.float32([[1.0, bad]]))
    with pytest.raises(ValueError, match="expected a number"):
        scale_bytes("fp4", np.float32([[np.nan]]))


def test_random_weights_are_held_as_a_released_checkpoint_is(released):
    held = arrays(from_pretrained(released))
    model = random_model(DSV4Config.from_hf(released), seed=1, dtype=jnp.float32)
    made = arrays(model)
    assert {n: (a.shape, a.dtype) for n, a in made.items()} == {n: (a.shape, a.dtype) for n, a in held.items()}
    for name, array in made.items():
        if array.dtype == jnp.uint8 and ".experts." not in name and "scale" not in name:
            assert np.isin(array, (127, 255)).sum() == 0, name  # E4M3's NaN
    table = np.sort(made["layers.0.ffn.gate.tid2eid"])
    assert (np.diff(table) > 0).all()
    manager = KVCacheManager.from_memory(model.config, 1 << 22, max_concurrent_requests=2, max_context_len=128)
    plan = manager.plan_step(
        np.array([manager.admit_request(), manager.admit_request()], np.int32), np.zeros(2, np.int32)
    )
    logits, _ = nnx.jit(model)(jnp.array([5, 7], jnp.int32), manager.cache, plan)
    assert np.isfinite(logits).all()
    assert 0.3 < np.std(logits) < 30
    assert not np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("flash", {}, "config is 'flash': expected a DSV4Config"),
        (None, {"dtype": "float16"}, "dtype is float16: expected float32 or bfloat16"),
        (None, {"dtype": None}, "dtype is None: expected float32 or bfloat16"),
        (None, {"seed": 1.5}, "seed is 1.5: expected an integer"),
    ],
)
def test_random_weights_of_what_makes_no_sense(config, options, message):
    with pytest.raises(ValueError, match="^" + message):
        random_model(config or DSV4Config.flash(), **options)


def test_shapes_alone_take_no_memory(released, monkeypatch):
    held = abstract(nnx.split(from_pretrained(released))[1])

    def full(num_bytes, what):
        raise ValueError(f"no room for {what}")

    monkeypatch.setattr("dsv4_jax.model.sharding.check_memory", full)
    config = DSV4Config.from_hf(released)
    with pytest.raises(ValueError, match=r"^no room for random weights"):
        random_model(config)
    shapes = jax.eval_shape(lambda: nnx.split(random_model(config, dtype=jnp.float32))[1])
    assert jax.tree.leaves(abstract(shapes)) == jax.tree.leaves(held)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def hold_as_released(model):
    """Gives an abstract model the shapes and types that its weights have as released."""

    def param(*shape):
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.uint8))

    for layer in model.layers:
        shared, experts = layer.ffn.shared_experts, layer.ffn.experts
        parts = [getattr(layer.attn, name) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
        for part in (*parts, layer.attn.indexer.wq_b, shared.w1, shared.w2, shared.w3):
            rows, columns = part.weight.shape
            part.weight, part.scale = param(rows, columns), param(-(-rows // 128), -(-columns // 128))
        for name in ("w1", "w2", "w3"):
            number, rows, columns = getattr(experts, name).shape
            setattr(experts, name, param(number, rows, columns // 2))
            setattr(experts, f"{name}_scale", param(number, rows, columns // 32))


@pytest.mark.skipif("cpu" not in dispatch.available(), reason="without native products a weight at a time is decoded")
def test_a_step_of_a_layer_of_flash_copies_none_of_its_weights():
    config = DSV4Config.flash().replace(num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0, vocab_size=256)
    model = nnx.eval_shape(lambda: DSV4Model(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    hold_as_released(model)
    manager = KVCacheManager.from_memory(config, 1 << 30, max_concurrent_requests=4, max_context_len=4096)
    slots = np.array([manager.admit_request() for _ in range(4)], np.int32)
    plan = manager.plan_step(slots, np.zeros(4, np.int32))
    graphdef, state = nnx.split(model)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    def step(state, ids, cache, plan):
        return nnx.merge(graphdef, state)(ids, cache, plan)

    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=2).lower(state, ids, abstract(manager.cache), plan)
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    # XLA multiplies bfloat16 on the CPU as float32: compressors, weights_proj and the router, which are no codes.
    attn = model.layers[0].attn
    floats = [part for of in (attn.compressor, attn.indexer.compressor) for part in (of.wkv, of.wgate)]
    floats += [attn.indexer.weights_proj, model.layers[0].ffn.gate]
    converted = sum(4 * math.prod(part.weight.shape) for part in floats)
    print(f"{temporaries:,} bytes of temporaries beside {weights:,} of weights: {temporaries / weights:.3%}")
    assert weights > 3 << 30
    assert converted < 0.014 * weights
    assert temporaries - converted < 0.01 * weights
