"""Names, shapes and types of a model's tensors, and what loading refuses."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import from_pretrained
from dsv4_jax.files.safetensors_file import open_checkpoint
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.checkpoint import load_tensors
from dsv4_jax.model.files.tensor_match import match_tensors
from dsv4_jax.model.files.tensor_names import canonical_name, expected_tensors, keeps_float32

FLOAT32_NAMES = {
    "norm.weight",
    "hc_head.hc_fn",
    "hc_head.hc_base",
    "hc_head.hc_scale",
    "layers.1.attn_norm.weight",
    "layers.1.ffn_norm.weight",
    "layers.1.hc_attn_fn",
    "layers.1.hc_attn_base",
    "layers.1.hc_attn_scale",
    "layers.1.hc_ffn_fn",
    "layers.1.hc_ffn_base",
    "layers.1.hc_ffn_scale",
    "layers.1.attn.q_norm.weight",
    "layers.1.attn.norm.weight",
    "layers.1.attn.attn_sink",
    "layers.1.attn.compressor.norm.weight",
    "layers.1.attn.compressor.ape",
    "layers.1.attn.indexer.compressor.norm.weight",
    "layers.1.attn.indexer.compressor.ape",
    "layers.1.ffn.gate.bias",
}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.weight"),
        ("layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.weight"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("embed_tokens.weight", "embed.weight"),
        ("model.embed.weight", "embed.weight"),
        ("embed.weight", "embed.weight"),
        ("head.weight", "head.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head.hc_fn"),
        ("hc_head_fn", "hc_head.hc_fn"),
        ("hc_head_base", "hc_head.hc_base"),
        ("hc_head_scale", "hc_head.hc_scale"),
        ("layers.0.attn.kv_norm.weight", "layers.0.attn.norm.weight"),
        ("layers.0.attn.q_norm.weight", "layers.0.attn.q_norm.weight"),
        ("layers.0.attn.wq_a.scale", "layers.0.attn.wq_a.scale"),
        ("model.layers.0.attn.wq_a.weight_scale_inv", "layers.0.attn.wq_a.scale"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize("which", ["tiny", "sharp"])
def test_expected_tensors_are_those_of_real_files(which, request):
    folder = request.getfixturevalue(which)
    checkpoint = open_checkpoint(folder)
    shapes = {canonical_name(name): checkpoint.info(name).shape for name in checkpoint}
    assert expected_tensors(DSV4Config.from_hf(folder)) == shapes


def test_expected_tensors_of_flash():
    shapes = expected_tensors(DSV4Config.flash())
    assert shapes["layers.2.attn.compressor.ape"] == (4, 1024)
    assert shapes["layers.3.attn.compressor.ape"] == (128, 512)
    assert shapes["layers.2.attn.indexer.wq_b.weight"] == (64 * 128, 1024)
    assert shapes["layers.0.attn.wo_a.weight"] == (8 * 1024, 8 * 512)
    assert shapes["layers.0.ffn.gate.tid2eid"] == (129280, 6)
    assert shapes["layers.42.ffn.experts.255.w2.weight"] == (4096, 2048)
    assert "layers.0.attn.compressor.ape" not in shapes
    assert "layers.3.attn.indexer.wq_b.weight" not in shapes
    assert "layers.3.ffn.gate.tid2eid" not in shapes


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, "bfloat16"])
def test_types_and_values(sharp, stored, dtype):
    config = DSV4Config.from_hf(sharp)
    tensors = load_tensors(sharp, config, dtype)
    layer = {name for name in tensors if name.startswith("layers.1.") or "layers" not in name}
    assert {name for name in layer if keeps_float32(name)} == FLOAT32_NAMES
    for name, array in tensors.items():
        assert array.flags.writeable  # its own memory, not the file's
        if name.endswith("tid2eid"):
            assert array.dtype == np.int32
        elif keeps_float32(name):
            assert array.dtype == np.float32
        else:
            assert array.dtype == np.dtype(dtype)
    # Every value of the file is in the result, bit for bit: BF16 widens exactly.
    for name, raw in stored.items():
        canonical = canonical_name(name)
        if ".experts." in name:
            layer, _, rest = canonical.partition(".experts.")
            expert, matrix, _ = rest.split(".")
            array = tensors[f"{layer}.experts.{matrix}"][int(expert)]
        else:
            array = tensors[canonical]
        np.testing.assert_array_equal(array.astype(np.float64), raw.astype(np.float64))


def test_experts_are_stacked(sharp):
    tensors = load_tensors(sharp)
    assert tensors["layers.4.ffn.experts.w1"].shape == (6, 32, 64)
    assert tensors["layers.4.ffn.experts.w2"].shape == (6, 64, 32)
    assert tensors["layers.4.ffn.experts.w3"].shape == (6, 32, 64)
    assert not [name for name in tensors if ".experts.0" in name]


def test_both_name_forms_shards_and_other_types_load_alike(sharp, stored, tmp_path, to_bytes):
    """The release's names, two shards, float16 and int32, draft layers beside: same result."""
    shutil.copy(sharp / "config.json", tmp_path)
    released = {canonical_name(name).replace("hc_head.hc_", "hc_head_"): array for name, array in stored.items()}
    # 0.5 times a small integer is exact in every type.
    norm = np.arange(64, dtype=np.float32) / 2
    for name, dtype in (("norm.weight", np.float16), ("layers.2.attn_norm.weight", np.float32)):
        released[name] = norm.astype(dtype)
    released["layers.0.ffn.gate.tid2eid"] = released["layers.0.ffn.gate.tid2eid"].astype(np.int32)
    released["mtp.0.norm.weight"] = norm
    released["layers.5.attn.wq_a.weight"] = norm
    names = sorted(released)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        (tmp_path / shard).write_bytes(to_bytes[0]({n: released[n] for n in members}))
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = load_tensors(sharp)
    expected["norm.weight"] = expected["layers.2.attn_norm.weight"] = norm
    got = load_tensors(tmp_path)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
    matched = match_tensors(open_checkpoint(tmp_path), DSV4Config.from_hf(tmp_path))
    assert sorted(matched.skipped) == ["layers.5.attn.wq_a.weight", "mtp.0.norm.weight"]


def test_tied_head(sharp, stored, rewrite):
    tied = DSV4Config.from_hf(sharp).replace(tie_word_embeddings=True)
    del stored["head.weight"]
    tensors = load_tensors(rewrite(stored), tied)
    assert tensors["head.weight"] is tensors["embed.weight"]
    stored["head.weight"] = stored["model.embed_tokens.weight"].astype(np.float32)
    assert load_tensors(rewrite(stored), tied)["head.weight"].shape == (192, 64)
    stored["head.weight"] = stored["head.weight"] * 2
    with pytest.raises(ValueError, match=r"head.weight differs from the embedding"):
        load_tensors(rewrite(stored), tied)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tensors(stored, rewrite):
    del stored["model.norm.weight"]
    refused(rewrite(stored), "1 tensor is missing: norm.weight; expected")
    for name in [name for name in stored if ".attn.wq" in name]:
        del stored[name]
    refused(
        rewrite(stored),
        r"11 tensors are missing: norm.weight, layers.0.attn.wq_a.weight, .* and 6 more; expected",
    )
    refused(rewrite({"model.norm.weight": stored["head.weight"]}), "holds 1 tensors: expected more")
    refused(rewrite({}), "holds 0 tensors")


def test_surplus_tensors(stored, rewrite):
    stored["model.layers.0.attn.compressor.ape"] = stored["model.norm.weight"]
    refused(rewrite(stored), "1 tensor is surplus: .*model.layers.0.attn.compressor.ape")


def test_one_tensor_under_two_names(stored, rewrite):
    stored["norm.weight"] = stored["model.norm.weight"]
    refused(rewrite(stored), "are names of the same tensor")


def test_misshapen_tensors(stored, rewrite):
    name = "model.layers.3.attn.wkv.weight"
    stored[name] = stored[name].T
    refused(rewrite(stored), rf"misshapen: {name} is \(64, 512\) instead of \(512, 64\)")


@pytest.mark.parametrize(
    ("name", "dtype", "tag"),
    [
        ("model.layers.3.attn.wkv.weight", np.int32, "I32"),
        ("model.layers.3.attn.q_norm.weight", ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        ("model.layers.0.ffn.gate.tid2eid", np.float32, "F32"),
    ],
)
def test_unsupported_types_are_named(stored, rewrite, name, dtype, tag):
    stored[name] = stored[name].astype(dtype)
    refused(rewrite(stored), rf"1 tensor is stored in a type that is not supported: '{name}' \({tag}\); expected F32")


@pytest.mark.parametrize("bad", [-1, 6, 1 << 40])
def test_tid2eid_is_checked(stored, rewrite, bad):
    name = "model.layers.0.ffn.gate.tid2eid"
    stored[name] = stored[name].copy()
    stored[name][17, 1] = bad
    refused(rewrite(stored), rf"tid2eid\[17, 1\] is {bad}: expected an expert from 0 to 5")


@pytest.mark.parametrize("dtype", ["float16", "int8", "float77", 3])
def test_dtypes_that_make_no_sense(sharp, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*: expected float32 or bfloat16"):
        load_tensors(sharp, dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype is .*: expected float32 or bfloat16"):
        from_pretrained(sharp, dtype, weights="bf16")  # of which the model's may differ


def test_missing_files(sharp, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a config.json"):
        load_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tensors(tmp_path / "nowhere", DSV4Config.flash())
    shutil.copy(sharp / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="found neither"):
        load_tensors(tmp_path)
    for path in (sharp / "config.json", sharp / "model.safetensors", None):
        with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
            from_pretrained(path)


def test_a_config_of_another_size_is_noticed_before_anything_is_listed(sharp):
    config = DSV4Config.flash().replace(num_hidden_layers=4096, compress_ratios=(0,) * 4096, n_routed_experts=65536)
    with pytest.raises(ValueError, match="holds 229 tensors: expected more than 805306368"):
        load_tensors(sharp, config)
