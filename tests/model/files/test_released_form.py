"""Checkpoints in the released form: converting to it, loading it, and what is refused."""

import json
import re
import shutil
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.files.safetensors_file import open_checkpoint
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files import released_form
from dsv4_jax.model.files.checkpoint import load_tensors
from dsv4_jax.model.files.released_form import quantise_checkpoint, released_type
from dsv4_jax.model.files.tensor_match import match_tensors
from dsv4_jax.model.files.tensor_names import (
    canonical_name,
    expected_tensors,
    keeps_float32,
    released_name,
    scale_name,
)
from dsv4_jax.model.files.weight_formats import scale_shape

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def released(tmp_path_factory, sharp):
    """The random checkpoint in the released form, in several shards."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    quantise_checkpoint(sharp, folder, shard_bytes=600_000)
    return folder


@pytest.fixture
def checkpoint(released):
    return released


def test_flash_would_be_written_as_it_was_released(data):
    """Names, types, shapes and counts of all 69,187 tensors of the published files."""
    published = json.loads((data / "released" / "DeepSeek-V4-Flash.json").read_text())["tensors"]
    assert sum(count for *_, count in published) == 69_187
    shapes = expected_tensors(DSV4Config.flash())
    # The draft layer: its tensors are known by name only.
    draft = {name: shape for name, dtype, shape, _ in published if name.startswith("mtp.") and dtype != "F8_E8M0"}
    for name, shape in draft.items():
        packed = released_type(canonical_name(name.replace("*", "0"))) == "fp4"
        experts = range(256) if ".experts.*" in name else (0,)
        for e in experts:
            key = canonical_name(name.replace("mtp.*", "mtp.0").replace("*", str(e)))
            shapes[key] = (shape[0], shape[1] * 2) if packed else tuple(shape)
    types = {"fp8": "F8_E4M3", "fp4": "I8"}
    found = Counter()
    for name, shape in shapes.items():
        form = released_type(name)
        pattern = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", released_name(name)))
        found[pattern, types.get(form, form), (shape[0], shape[1] // 2) if form == "fp4" else shape] += 1
        if form in types:
            found[scale_name(pattern), "F8_E8M0", scale_shape(form, shape)] += 1
    assert found == {(name, dtype, tuple(shape)): count for name, dtype, shape, count in published}


def dequantised(checkpoint, name):
    """The weight `name`, by a computation of the test's own."""
    raw, info = checkpoint[name], checkpoint.info(name)
    if info.dtype not in ("F8_E4M3", "I8"):
        return raw.astype(np.float32)
    scales = np.exp2(checkpoint[name.replace(".weight", ".scale")].view(np.uint8).astype(np.float32) - 127)
    if info.dtype == "F8_E4M3":
        values = raw.astype(np.float32)
        return values * np.kron(scales, np.ones((128, 128), np.float32))[: values.shape[0], : values.shape[1]]
    codes = raw.view(np.uint8)
    values = np.stack([E2M1[codes % 16], E2M1[codes // 16]], axis=-1).reshape(codes.shape[0], -1)
    return values * np.repeat(scales, 32, axis=1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_loading_gives_the_bits_of_a_dequantisation_written_apart(released, dtype):
    checkpoint = open_checkpoint(released)
    types = Counter(checkpoint.info(name).dtype for name in checkpoint)
    assert (types["I8"], types["F8_E4M3"]) == (5 * 6 * 3, 5 * 5 + 5 * 3 + 2)  # experts; attention, shared, indexers
    tensors = load_tensors(released, dtype=dtype)
    for name in checkpoint:
        canonical = canonical_name(name)
        if canonical.endswith((".scale", ".tid2eid")) and not canonical.endswith("hc_scale"):
            continue
        layer, experts, rest = canonical.partition(".experts.")
        if experts:
            number, matrix, _ = rest.split(".")
            got = tensors[f"{layer}.experts.{matrix}"][int(number)]
        else:
            got = tensors[canonical]
        wanted = dequantised(checkpoint, name)
        if dtype != np.float32 and not keeps_float32(canonical):
            assert got.dtype == dtype
            if checkpoint.info(name).dtype in ("F8_E4M3", "I8"):
                np.testing.assert_array_equal(wanted.astype(dtype).astype(np.float32), wanted)  # nothing is lost
        np.testing.assert_array_equal(got.astype(np.float32), wanted, err_msg=name)


def test_conversion_keeps_what_the_formats_allow(released, sharp):
    before, after = load_tensors(sharp), load_tensors(released)
    assert before.keys() == after.keys()
    changed = set()
    for name, array in before.items():
        form = released_type(re.sub(r"\.experts\.(w\d)$", r".experts.0.\1.weight", name))
        # Half of the widest step, 32 up to 448 and 2 up to 6, times the scale of the largest value.
        bound = {"fp8": 16.0, "fp4": 1.0}.get(form)
        difference = np.abs(array.astype(np.float64) - after[name]).max()
        if form in ("fp8", "fp4"):
            changed.add(form)
            largest = np.abs(array.astype(np.float64)).max()
            assert 0 < difference <= bound * 2.0 ** np.ceil(np.log2(largest / (448 if form == "fp8" else 6)))
        elif form == "BF16":
            np.testing.assert_array_equal(after[name], array.astype(ml_dtypes.bfloat16).astype(np.float32))
        else:
            np.testing.assert_array_equal(after[name], array)
    assert changed == {"fp8", "fp4"}


def test_files_are_as_a_release_has_them(released, sharp):
    config = json.loads((released / "config.json").read_text())
    published = json.loads((sharp.parent / "configs" / "DeepSeek-V4-Flash.json").read_text())
    assert {**config["quantization_config"]} == published["quantization_config"]
    assert config["expert_dtype"] == published["expert_dtype"]
    assert DSV4Config.from_hf(released) == DSV4Config.from_hf(sharp)
    assert (released / "generation_config.json").read_bytes() == (sharp / "generation_config.json").read_bytes()
    index = json.loads((released / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    checkpoint = open_checkpoint(released)
    assert index["metadata"]["total_size"] == sum(checkpoint.info(name).nbytes for name in checkpoint)
    for file in checkpoint.files.values():
        assert sum(file.info(name).nbytes for name in file) <= 600_000
        for name in file:  # readers that map the file want each type at a multiple of its size
            assert file.info(name).begin % (8 if name.endswith("tid2eid") else 4 if "hc_" in name else 1) == 0
    assert sorted(p.name for p in released.parent.iterdir()) == ["checkpoint"]


def test_the_safetensors_package_reads_what_is_written(released):
    safetensors = pytest.importorskip("safetensors")
    checkpoint = open_checkpoint(released)
    for file in checkpoint.files.values():
        with open(file.path, "rb") as opened:
            header = dict(safetensors.deserialize(opened.read()))
        assert set(header) == set(file)
        for name, entry in header.items():
            assert (entry["dtype"], tuple(entry["shape"])) == (file.info(name).dtype, file.info(name).shape)
            assert bytes(entry["data"]) == file[name].tobytes()


def test_names_and_tags_of_other_writers_load_alike(released, stored, rewrite, to_bytes):
    """Hugging Face's names, `weight_scale_inv`, float32 scales, FP4 pairs as U8, draft layers beside."""
    expected = load_tensors(released)
    renamed = {}
    for name, array in stored.items():
        canonical = canonical_name(name)
        if canonical == "embed.weight":
            canonical = "embed_tokens.weight"
        if canonical.endswith(".scale"):
            canonical, array = canonical.replace(".scale", ".weight_scale_inv"), array.astype(np.float32)
        if array.dtype == np.int8 and ".w1." in name:
            array = array.view(np.uint8)
        renamed[f"model.{canonical}" if canonical != "head.weight" else "lm_head.weight"] = array
    renamed["mtp.0.e_proj.weight"] = renamed["mtp.0.e_proj.scale"] = np.zeros((2, 2), np.float32)
    folder = rewrite(renamed)
    got = load_tensors(folder)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), name
    matched = match_tensors(open_checkpoint(folder), DSV4Config.from_hf(folder))
    assert sorted(matched.skipped) == ["mtp.0.e_proj.scale", "mtp.0.e_proj.weight"]


def test_fp4_by_its_own_tag(released, stored, tmp_path, to_bytes):
    """safetensors' type F4, whose shape counts values, as the release's converter for inference writes it."""
    name = "layers.4.ffn.experts.3.w2.weight"
    checkpoint, header, body = open_checkpoint(released), {}, b""
    for key, array in stored.items():
        info = checkpoint.info(key)
        dtype, shape = ("F4", [64, 32]) if key == name else (info.dtype, list(info.shape))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    (tmp_path / "model.safetensors").write_bytes(to_bytes[1](header, body))
    got = load_tensors(tmp_path, DSV4Config.from_hf(released))
    for key, array in load_tensors(released).items():
        assert got[key].tobytes() == array.tobytes()


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_scales_that_are_wrong_are_named(stored, rewrite):
    name = "layers.3.attn.wq_b.scale"
    good = stored[name]
    del stored[name]
    refused(rewrite(stored), f"1 tensor is missing: {name};")
    stored[name] = good[:-1]
    refused(rewrite(stored), rf"1 tensor is misshapen: {name} is \(\d+, 1\) instead of \(\d+, 1\)")
    stored[name] = good.astype(np.float16)
    refused(rewrite(stored), rf"a type that is not supported: '{name}' \(F16\)")
    stored[name] = np.full(good.shape, 255, np.uint8).view(ml_dtypes.float8_e8m0fnu)
    refused(rewrite(stored), rf"{name}: scale \[0, 0\] is nan: expected a number")
    stored[name] = good
    stored["layers.3.ffn.gate.scale"] = good
    refused(rewrite(stored), "1 tensor is surplus: 'layers.3.ffn.gate.scale'")


def test_packed_weights_of_a_wrong_shape_are_named(stored, rewrite):
    name = "layers.0.ffn.experts.2.w1.weight"
    stored[name] = stored[name][:, :-1]
    refused(rewrite(stored), rf"1 tensor is misshapen: {name} is \(32, 31\) instead of \(32, 32\)")


def test_a_truncated_shard_is_named(released, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(released, folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(folder, rf"{last.name}: tensor '.*' ends at byte \d+, but the file has \d+: truncated")
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{last.name}: no such file, but model.safetensors.index.json names"):
        load_tensors(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("weight_block_size", [64, 64]), ("fmt", "e5m2"), ("quant_method", "mxfp8")]
)
def test_quantisation_of_another_kind_is_refused(stored, rewrite, key, value):
    folder = rewrite(stored)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, rf"config.json: quantization_config.{key} is .*: expected ")


def test_more_than_the_machine_has_is_refused(released, monkeypatch):
    monkeypatch.setattr("dsv4_jax.model.files.checkpoint.os.sysconf", lambda name: 1000)
    with pytest.raises(
        ValueError, match=r"its tensors take 0.0 GiB, 0.0 GiB more than this machine's memory: expected"
    ):
        load_tensors(released)


def test_progress_counts_every_byte_of_the_result(released):
    calls = []
    tensors = load_tensors(released, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (sum(array.nbytes for array in tensors.values()),) * 2


def unconverted(rewrite_from, tmp_path, to_bytes, changes):
    """A copy of a checkpoint with some tensors changed."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(rewrite_from / "config.json", folder)
    tensors = {**open_checkpoint(rewrite_from), **changes}
    (folder / "model.safetensors").write_bytes(to_bytes[0](tensors))
    return folder


def test_draft_layers_are_converted_and_counted(sharp, tmp_path, to_bytes):
    weight = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    draft = {
        "mtp.0.attn.wq_a.weight": weight,
        "mtp.0.ffn.experts.0.w1.weight": weight,
        "mtp.0.attn.kv_norm.weight": weight[0],
    }
    source = unconverted(sharp, tmp_path, to_bytes, draft)
    done = []
    report = quantise_checkpoint(source, tmp_path / "out", progress=lambda a, b: done.append((a, b)))
    assert report.draft == 3
    assert done[-1] == (report.source_bytes, report.source_bytes)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert report.files == tuple(checkpoint.files)
    assert report.target_bytes == sum(checkpoint.info(name).nbytes for name in checkpoint)
    assert report.fp8 + report.fp4 + report.other == len(checkpoint) - report.fp8 - report.fp4
    types = {name: checkpoint.info(name).dtype for name in checkpoint if name.startswith("mtp.")}
    assert types == {
        "mtp.0.attn.wq_a.weight": "F8_E4M3",
        "mtp.0.attn.wq_a.scale": "F8_E8M0",
        "mtp.0.ffn.experts.0.w1.weight": "I8",
        "mtp.0.ffn.experts.0.w1.scale": "F8_E8M0",
        "mtp.0.attn.kv_norm.weight": "BF16",
    }
    load_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp.0.h_proj.weight": np.ones(4, np.float32)}, r"'mtp.0.h_proj.weight' is \(4,\): expected two sizes"),
        ({"mtp.0.ffn.experts.0.w1.weight": np.ones((4, 40), np.float32)}, "w1.weight': .* a multiple of 32 columns"),
        ({"mtp.0.norm.weight": np.ones(4, np.int8)}, "'mtp.0.norm.weight' is I8: expected F32, F16, BF16"),
        (
            {"model.layers.1.attn.wq_a.weight": np.full((32, 64), np.nan, np.float32)},
            r"layers.1.attn.wq_a.weight\[0, 0\] is nan: expected a number",
        ),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(sharp, tmp_path, to_bytes, changes, message):
    source = unconverted(sharp, tmp_path, to_bytes, changes)
    with pytest.raises(ValueError, match=message) as error:
        quantise_checkpoint(source, tmp_path / "out")
    assert str(source) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing(sharp, tmp_path, monkeypatch):
    seen = []

    def interrupt(form, weight):
        seen.append(sorted(p.name for p in next(tmp_path.iterdir()).iterdir()))
        if len(seen) == 100:
            raise KeyboardInterrupt
        return quantise(form, weight)

    quantise = released_form.quantise
    monkeypatch.setattr(released_form, "quantise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantise_checkpoint(sharp, tmp_path / "out", shard_bytes=600_000)
    assert len(seen[-1]) > 1  # whole files were there by then
    assert list(tmp_path.iterdir()) == []


def test_targets_and_sources_that_are_refused(sharp, released, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\d+ weights are quantised already, such as 'layers.0.attn.wq_a.weight'"):
        quantise_checkpoint(released, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):
        quantise_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder to make out in"):
        quantise_checkpoint(sharp, tmp_path / "nowhere" / "out")
    with pytest.raises(ValueError, match="shard_bytes is 0: expected at least 1"):
        quantise_checkpoint(sharp, tmp_path / "out", shard_bytes=0)
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: disk)
        with pytest.raises(ValueError, match=r"out: [\d,]{7,} bytes are to be written, but the disk has 1,000 left"):
            quantise_checkpoint(sharp, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "dangling").symlink_to("nowhere")
    for target in (tmp_path / "link", tmp_path / "dangling", "/dev/null"):
        with pytest.raises(ValueError, match=f"{target}: exists already; expected the name of a new folder"):
            quantise_checkpoint(sharp, target)
    with pytest.raises(ValueError, match=r"config\.json is a file: expected the folder of a checkpoint"):
        quantise_checkpoint(sharp / "config.json", tmp_path / "new")
    with pytest.raises(ValueError, match=f"{'x' * 250} cannot be made: file name too long"):
        quantise_checkpoint(sharp, tmp_path / ("x" * 250))
    quantise_checkpoint(sharp, tmp_path / "out")  # an empty folder will do
    with pytest.raises(ValueError, match="out: exists already; expected the name of a new folder"):
        quantise_checkpoint(sharp, tmp_path / "out")
