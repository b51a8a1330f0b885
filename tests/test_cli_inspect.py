"""`dsv4-jax inspect`: what it says of checkpoints that load and of those that do not."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from dsv4_jax import cli
from dsv4_jax.files.safetensors_file import DTYPES, open_checkpoint
from dsv4_jax.files.safetensors_writer import TensorEntry, write_safetensors
from dsv4_jax.model.checkpoint import load_tensors
from dsv4_jax.model.inspection import inspect_checkpoint
from dsv4_jax.model.released_form import quantise_checkpoint

SHARP = pathlib.Path(__file__).parent / "data" / "sharp_dsv4"


@pytest.fixture
def run(capsys):
    """run(...) -> (exit status, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def damaged(tmp_path):
    """Writes a copy of the checkpoint with changed tensors (None: left out); returns its folder."""

    def write(changes):
        shutil.copy(SHARP / "config.json", tmp_path)
        tensors = {k: v for k, v in ({**open_checkpoint(SHARP)} | changes).items() if v is not None}
        tag = {dtype: name for name, dtype in DTYPES.items() if name != "F4"}
        entries = [TensorEntry(name, tag[array.dtype], array.shape) for name, array in tensors.items()]
        write_safetensors(tmp_path / "model.safetensors", entries, tensors.values())
        return tmp_path

    return write


def test_a_checkpoint_that_loads(run):
    status, out, err = run("inspect", SHARP)
    assert (status, err) == (0, "")
    assert "bfloat16 and float32 weights, Hugging Face names" in out
    assert "5 layers (1 SWA, 2 CSA, 2 HCA), hidden size 64" in out
    assert "routed experts" in out
    assert out.rstrip().endswith("it loads: nothing is missing or surplus")


def test_sizes_are_those_of_the_tensors(tmp_path):
    quantise_checkpoint(SHARP, tmp_path / "released")
    before, after = inspect_checkpoint(SHARP), inspect_checkpoint(tmp_path / "released")
    tensors = load_tensors(SHARP)
    for report in (before, after):
        assert report.parameters == sum(array.size for array in tensors.values())
        assert report.result_bytes["float32"] == sum(array.nbytes for array in tensors.values())
        files = pathlib.Path(report.path).glob("*.safetensors")
        headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
        assert report.nbytes + headers == sum(f.stat().st_size for f in pathlib.Path(report.path).glob("*.safetensors"))
        assert sum(part.nbytes for part in report.parts.values()) == report.nbytes
        assert sum(part.nbytes for part in report.dtypes.values()) == report.nbytes
        assert "other" not in report.parts
    assert (before.names, after.names) == ("Hugging Face", "release")
    assert after.kind == "FP8 weights and FP4 experts, as released"
    for part in before.parts:
        assert before.parts[part].parameters == after.parts[part].parameters, part


def test_what_is_wrong_is_said_and_the_status_is_1(run, damaged):
    norm = np.ones(7, np.float32)
    folder = damaged(
        {
            "model.layers.0.attn.wq_a.weight": None,
            "model.layers.1.attn.surplus": norm,
            "model.norm.weight": norm,
            "model.layers.2.attn.attn_sink": np.ones(4, np.int32),
            "mtp.0.norm.weight": norm,
        }
    )
    status, out, _ = run("inspect", folder)
    assert status == 1
    assert "1 missing: layers.0.attn.wq_a.weight\n" in out
    assert "1 surplus: 'model.layers.1.attn.surplus'\n" in out
    assert "1 misshapen: model.norm.weight is (7,) instead of (64,)\n" in out
    assert "1 unsupported: 'model.layers.2.attn.attn_sink' (I32)\n" in out
    assert "1 tensors of draft layers are skipped" in out
    assert "it does not load as it is" in out
    status, out, err = run("inspect", folder, "--json")
    report = json.loads(out)
    assert (status, err) == (1, "")
    assert report["missing"] == ["layers.0.attn.wq_a.weight"]
    assert report["draft"] == 1
    assert report["parts"]["draft layers"]["tensors"] == 1


def test_without_a_configuration_or_with_another(run, tmp_path, damaged):
    shutil.copy(SHARP / "model.safetensors", tmp_path)
    words = {tmp_path: "config.json: no such file", tmp_path / "model.safetensors": "a file by itself: give its folder"}
    for where, problem in words.items():
        status, out, _ = run("inspect", where)
        assert status == 1
        assert problem in out
        assert f"{sum(array.size for array in open_checkpoint(SHARP).values()):,} parameters" in out
    config = json.loads((SHARP / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 60_000}))
    status, out, _ = run("inspect", tmp_path)
    assert status == 1
    assert "expected more than 900000 for 5 layers of 60000 experts" in out


def test_what_cannot_be_read_is_one_sentence_and_status_2(run, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    for path, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "bad.safetensors", "a zip archive")):
        status, out, err = run("inspect", path)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
