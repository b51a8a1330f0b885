"""Checkpoints as other people write them: quantised otherwise, the same bits under other names, more than the text."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.files.safetensors_file import open_checkpoint
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.checkpoint import load_tensors
from dsv4_jax.model.files.inspection import inspect_checkpoint
from dsv4_jax.model.files.released_form import quantise_checkpoint
from dsv4_jax.model.files.tensor_names import expected_tensors, released_name

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
EXPERT = re.compile(r".*\.ffn\.experts\.\d+\.w[123]\.weight")


@pytest.fixture(scope="module")
def released(tmp_path_factory, sharp):
    """The random checkpoint in the released form."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    quantise_checkpoint(sharp, folder)
    return folder


@pytest.fixture
def checkpoint(released):
    return released


def experts(stored, make):
    """`stored` with other tensors in place of every expert: ending -> array, from its sizes (out, in)."""
    tensors = dict(stored)
    for name in stored:
        if EXPERT.fullmatch(name):
            codes, stem = tensors.pop(name), name.removesuffix(".weight")
            del tensors[f"{stem}.scale"]
            tensors |= {stem + ending: array for ending, array in make(codes.shape[0], codes.shape[1] * 2).items()}
    return tensors


def weights(stored, make):
    """`stored` with every FP8 weight and its scales through `make`."""
    tensors = dict(stored)
    for name, codes in stored.items():
        if codes.dtype == F8:
            scale = name.removesuffix(".weight") + ".scale"
            tensors[name], tensors[scale] = make(codes, stored[scale])
    return tensors


def ones(shape, dtype=np.float32):
    return np.ones(shape, dtype)


# name -> what becomes of the tensors, what config.json says of it (None: nothing), words of the refusal
OTHERWISE = {
    "NVFP4 of ModelOpt": (
        lambda t: experts(t, lambda o, i: {
            ".weight": ones((o, i // 2), np.uint8), ".weight_scale": ones((o, i // 16), F8),
            ".weight_scale_2": ones(()), ".input_scale": ones(()),
        }),
        {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"},
        r"quantization_config.moe_quant_algo is 'NVFP4', and tensors such as .*weight_scale_2.* show NVFP4",
    ),
    "NVFP4, and nothing says so": (
        lambda t: experts(t, lambda o, i: {
            ".weight": ones((o, i // 2), np.uint8), ".weight_scale": ones((o, i // 16), F8),
        }),
        None, r"quantised as FP4 with a scale per 16, which tensors such as .* \(config.json does not say so\)",
    ),
    "compressed-tensors": (
        lambda t: experts(t, lambda o, i: {
            ".weight_packed": ones((o, i // 8), np.int32), ".weight_scale": ones((o, i // 32), BF16),
            ".weight_shape": np.array([o, i]),
        }),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        r"quantization_config.format is 'pack-quantized', and tensors such as .*weight_shape.* show packed integers",
    ),
    "compressed-tensors by its scheme": (
        dict, {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"type": "int"}}}},
        r"config_groups.group_0.weights.type is 'int': expected FP8 .* FP4",
    ),
    "GPTQ": (
        lambda t: experts(t, lambda o, i: {
            ".qweight": ones((i // 8, o), np.int32), ".scales": ones((i // 32, o), BF16),
        }),
        {"quant_method": "gptq", "bits": 4},
        r"quant_method is 'gptq', and tensors such as .*qweight.* integers .AWQ or GPTQ.: ",
    ),
    "INT8": (
        lambda t: experts(t, lambda o, i: {".weight": ones((o, i), np.int8), ".weight_scale": ones((o, 1))}),
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        r"format is 'int-quantized', and tensors such as .* \(I8 .* show INT8: expected FP8",
    ),
    "FP8 with a scale per row": (
        lambda t: weights(t, lambda codes, scale: (codes, ones((codes.shape[0], 1)))),
        {"quant_method": "compressed-tensors"}, r"FP8 with a scale per row.* says 'compressed-tensors'",
    ),
    "FP8 with a scale per tensor": (
        lambda t: weights(t, lambda codes, scale: (codes, ones(()))), {"quant_method": "modelopt", "quant_algo": "FP8"},
        r"FP8 with one scale per tensor",
    ),
    "MXFP8": (
        lambda t: weights(t, lambda codes, scale: (codes, ones((codes.shape[0], codes.shape[1] // 32), np.uint8))),
        {"quant_method": "quark"}, r"FP8 with a scale per 32,",
    ),
    "blocks of another size": (
        lambda t: weights(t, lambda codes, scale: (codes, ones((-(-codes.shape[0] // 32), -(-codes.shape[1] // 32))))),
        None, r"FP8 with a scale per 32x32",
    ),
    "E5M2": (
        lambda t: weights(t, lambda codes, scale: (codes.view(ml_dtypes.float8_e5m2), scale)), None,
        r"FP8 of the other kind \(E5M2\)",
    ),
    "by its word alone": (dict, {"quant_method": "awq"}, r"quantization_config.quant_method is 'awq': expected"),
}  # fmt: skip


@pytest.mark.parametrize("how", OTHERWISE)
def test_weights_quantised_otherwise_are_one_sentence_of_loading_and_inspect_alike(stored, rewrite, how):
    change, said, words = OTHERWISE[how]
    folder = rewrite(change(stored))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as error:
        load_tensors(folder)
    assert "\n" not in str(error.value)
    assert "expected " in str(error.value)
    assert inspect_checkpoint(folder).problems == (str(error.value),)
    with pytest.raises(ValueError, match=words):
        quantise_checkpoint(folder, folder / "again")


def test_words_beside_the_tensors_are_read_too(stored, rewrite):
    folder = rewrite(stored)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quantization.quant_algo is 'NVFP4': expected FP8"):
        load_tensors(folder)
    (folder / "config.json").unlink()
    assert any("NVFP4" in problem for problem in inspect_checkpoint(folder).problems)


def bytes_as(dtype):
    def change(name, array):
        return name, array.view(dtype) if array.dtype == ml_dtypes.float8_e8m0fnu else array

    return change


def quark(name, array):
    return name.replace(".scale", ".weight_scale"), array


def packed(name, array):
    """As compressed-tensors names experts in MXFP4."""
    if EXPERT.fullmatch(name):
        return name + "_packed", array.view(np.uint8)
    return quark(*bytes_as(np.uint8)(name, array))


def untyped(name, array):
    return name, array.view(np.uint8) if array.dtype.itemsize == 1 else array


def bfloat16_scales(name, array):
    return name, array.astype(BF16) if array.dtype == ml_dtypes.float8_e8m0fnu else array


def beside_vision(name, array):
    return f"language_model.model.{name}", array


@pytest.mark.parametrize(
    ("change", "method"),
    [
        (bytes_as(np.uint8), "fp8"), (bytes_as(np.int8), "fp8"), (quark, "quark"), (packed, "compressed-tensors"),
        (untyped, None), (bfloat16_scales, "fp8"), (beside_vision, "fp8"),
    ],
)  # fmt: skip
def test_the_same_bits_under_other_names_and_tags_load(released, stored, rewrite, change, method):
    folder = rewrite(dict(change(name, array) for name, array in stored.items()))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = None if method is None else {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    got = load_tensors(folder)
    for name, array in load_tensors(released).items():
        assert got[name].tobytes() == array.tobytes(), name
    report = inspect_checkpoint(folder)
    assert report.problems == ()
    assert report.parameters == inspect_checkpoint(released).parameters


def test_experts_in_fp4_may_be_shared_ones_too(stored, rewrite):
    """Their codes cover half as many columns; nothing else is needed."""
    tensors = dict(stored)
    for name in stored:
        if ".shared_experts." in name and name.endswith(".weight"):
            rows, columns = stored[name].shape
            tensors[name] = np.full((rows, columns // 2), 0x22, np.uint8)
            tensors[name.removesuffix(".weight") + ".scale"] = np.full((rows, columns // 32), 128, np.uint8)
    got = load_tensors(rewrite(tensors))
    np.testing.assert_array_equal(got["layers.1.ffn.shared_experts.w1.weight"], np.float32(2.0))


def test_what_text_needs_not_is_skipped_and_counted_and_its_files_may_be_missing(
    run, released, stored, tmp_path, to_bytes
):
    """A vision tower, a second bias of routers, draft layers; shards that hold only those."""
    beside = {
        f"model.{name}": np.ones((2, 2), BF16) for name in ("vision.patch.weight", "aligner.fc1.weight", "mtp.0.x")
    }
    main = stored | {"layers.1.ffn.gate.bias_vl": np.ones(4, np.float32), "image_newline": np.ones(64, BF16)}
    shutil.copy(released / "config.json", tmp_path)
    files = dict.fromkeys(main, "main.safetensors") | dict.fromkeys(beside, "beside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "main.safetensors").write_bytes(to_bytes[0](main))
    expected = load_tensors(released)
    for there in (True, False):
        if there:
            (tmp_path / "beside.safetensors").write_bytes(to_bytes[0](beside))
        else:
            (tmp_path / "beside.safetensors").unlink()
        got = load_tensors(tmp_path)
        assert all(got[name].tobytes() == array.tobytes() for name, array in expected.items())
        assert got.keys() == expected.keys()
        report = inspect_checkpoint(tmp_path)
        assert (report.problems, report.draft, report.vision, report.absent) == ((), 1, 4, 0 if there else 3)
        status, out, _ = run("inspect", tmp_path)
        assert status == 0
        assert "1 tensors of draft layers are skipped; 4 tensors of vision parts are skipped" in out
        assert ("3 of them are in files that are not there" in out) is not there
    (tmp_path / "main.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"main.safetensors: no such file, but"):
        load_tensors(tmp_path)


def test_a_vision_model_keeps_its_parts_in_the_released_form(sharp, tmp_path, to_bytes):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(sharp / "config.json", source)
    tensors = dict(open_checkpoint(sharp)) | {"vision.conv.weight": np.ones((2, 3, 4), BF16)}
    (source / "model.safetensors").write_bytes(to_bytes[0](tensors))
    quantise_checkpoint(source, tmp_path / "target")
    assert open_checkpoint(tmp_path / "target")["vision.conv.weight"].shape == (2, 3, 4)
    assert inspect_checkpoint(tmp_path / "target").vision == 1


def test_a_configuration_may_hold_the_text_model_by_itself(released):
    raw = json.loads((released / "config.json").read_text())
    assert DSV4Config.from_hf({"model_type": "vision_of_it", "text_config": raw}) == DSV4Config.from_hf(raw)


def test_two_ratios_per_layer_are_the_two_ratios(data):
    raw = json.loads((data / "configs" / "DeepSeek-V4-Flash.json").read_text())

    def read(ratios, **more):
        config = DSV4Config.from_hf(raw | {"compress_ratios": ratios + [0] * (43 - len(ratios))} | more)
        return config.csa_ratio, config.hca_ratio, config.block_size

    assert read([0, 112, 4, 112]) == read([0, 112, 4], csa_ratio=4) == read([112, 4], hca_ratio=112) == (4, 112, 112)
    assert read([32, 4]) == (4, 32, 32)
    assert read([128, 64]) == (64, 128, 128)
    assert read([4, 0]) == read([128]) == (4, 128, 128)
    for ratios in ([8], [4, 8, 128], [4, 32, 128]):
        with pytest.raises(ValueError, match="known ratios 0, 4, 128; the keys csa_ratio and hca_ratio name others"):
            read(ratios)
    layer = released_name("layers.1.attn.compressor.ape")
    other = DSV4Config.from_hf(raw | {"compress_ratios": [0, 112] + [4] * 41})
    assert expected_tensors(other)[layer] == (112, 512)
