"""`dsv4-jax inspect`: what it says of checkpoints that load and of those that do not."""

import dataclasses
import errno
import json
import pathlib
import shutil
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
from small_model import SMALL

from dsv4_jax import KVCacheManager, cli
from dsv4_jax.cache.occupancy import Occupancy, PoolState
from dsv4_jax.cache.transfer.snapshot_file import save_snapshot
from dsv4_jax.cli import small_run
from dsv4_jax.cli.inspect_report import snapshot_report
from dsv4_jax.files.safetensors_file import DTYPES, open_checkpoint
from dsv4_jax.files.safetensors_writer import TensorEntry, write_safetensors
from dsv4_jax.model.files.checkpoint import load_tensors
from dsv4_jax.model.files.inspection import inspect_checkpoint
from dsv4_jax.model.files.released_form import quantise_checkpoint

SHARP = pathlib.Path(__file__).parents[1] / "data" / "sharp_dsv4"


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


def test_without_a_configuration_or_with_another(run, tmp_path, damaged, monkeypatch):
    shutil.copy(SHARP / "model.safetensors", tmp_path)
    words = {tmp_path: "config.json: no such file", tmp_path / "model.safetensors": "a file by itself: give its folder"}
    for where, problem in words.items():
        status, out, _ = run("inspect", where)
        assert status == 1
        assert problem in out
        assert f"{sum(array.size for array in open_checkpoint(SHARP).values()):,} parameters" in out
    denied = PermissionError(errno.EACCES, "Permission denied", "x/config.json")
    with monkeypatch.context() as patch:
        patch.setattr("dsv4_jax.model.config.read_json_object", Mock(side_effect=denied))
        (tmp_path / "config.json").write_text("{}")
        status, out, _ = run("inspect", tmp_path)
    assert status == 1
    assert "\nx/config.json: permission denied\n" in out
    config = json.loads((SHARP / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 60_000}))
    status, out, _ = run("inspect", tmp_path)
    assert status == 1
    assert "expected more than 900000 for 5 layers of 60000 experts" in out


def test_weights_that_are_quantised_in_another_way_do_not_load(run, tmp_path):
    quantise_checkpoint(SHARP, tmp_path / "released")
    path = tmp_path / "released" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    path.write_text(json.dumps(config))
    status, out, _ = run("inspect", tmp_path / "released")
    assert status == 1
    assert "quantization_config.weight_block_size is [64, 64]: expected [128, 128]" in out
    assert out.endswith("it does not load as it is\n")


def test_what_cannot_be_read_is_one_sentence_and_status_2(run, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    for path, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "bad.safetensors", "a zip archive")):
        status, out, err = run("inspect", path)
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A request of 29 tokens in a file."""
    manager = KVCacheManager(
        SMALL, SMALL.schedule, max_concurrent_requests=1, num_blocks_per_csa_layer=4, num_blocks_per_hca_layer=4,
        max_context_len=48, max_rollback=5, hca_tail="running",
    )  # fmt: skip
    slot = manager.admit_request()
    plan = manager.plan_step([slot] * 29, np.arange(29))
    manager.cache = manager.cache.with_blocks(plan.new_blocks)
    taken = manager.preempt(slot, rollback=3)
    path = tmp_path_factory.mktemp("snapshot") / "request.safetensors"
    save_snapshot(taken, path)
    return taken, path


def test_a_snapshot(run, snapshot):
    taken, path = snapshot
    status, out, err = run("inspect", path)
    assert (status, err) == (0, "")
    assert "a snapshot of a request, as it was written" in out
    assert "29 tokens, 3 of them can be rolled back" in out
    assert "fp8 records, nvfp4 indexer keys, running sums in HCA tails" in out
    assert f"fingerprint of the model: {taken.fingerprint}\n" in out
    status, out, _ = run("inspect", path, "--json")
    report = json.loads(out)
    assert status == 0
    assert sum(report["layers"].values()) == len(taken.layers)
    assert report["parts"]["csa entries"] == sum(
        array.nbytes for name, array in taken.arrays.items() if name.startswith("csa.entries")
    )
    assert sum(report["parts"].values()) == report["bytes"] == taken.nbytes
    assert (report["length"], report["records"], report["state_bytes"]) == (29, "fp8", taken.state_nbytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (["swa"],)}, "layers is (['swa'],): expected kinds of swa, csa, hca"),
        ({"layers": ()}, "layers is ()"),
        ({"schemas": {}}, "schemas is []: expected one for every kind of layer"),
        ({"length": -5}, "length is -5: expected a number of tokens"),
        ({"rollback": 10**300}, "rollback is an integer of 997 bits"),
        ({"fingerprint": "\x1b[2J"}, "fingerprint is '\\x1b[2J': expected 64 hexadecimal digits"),
        ({"arrays": {"x": np.zeros(1)}}, "the name of an array is 'x'"),
        ({"arrays": {"csa.\x1b.y": np.zeros(1)}}, "the name of an array is 'csa.\\x1b.y'"),
        ({"cache_dtype": "\x1b[2J"}, "cache_dtype is '\\x1b[2J': expected one of fp8, fp8_ue8m0, bf16, fp32"),
        ({"indexer_dtype": ["nvfp4"]}, "indexer_dtype is ['nvfp4']"),
        ({"hca_tail": 3}, "hca_tail is 3: expected one of full, running"),
    ],
)
def test_a_snapshot_that_no_cache_wrote_is_one_sentence(snapshot, changes, words):
    """Whoever writes a file can give it its checksum: what `inspect` shows of it cannot move a terminal's cursor."""
    taken = snapshot[0]
    if changes.keys() <= {"cache_dtype", "indexer_dtype", "hca_tail"}:
        changes = {"schemas": {kind: dataclasses.replace(s, **changes) for kind, s in taken.schemas.items()}}
    with pytest.raises(ValueError, match=r"x\.safetensors: ") as refused:
        snapshot_report("x.safetensors", dataclasses.replace(taken, **changes))
    assert words in str(refused.value)


def test_a_damaged_snapshot_is_one_sentence_and_status_2(run, snapshot, tmp_path):
    raw = bytearray(snapshot[1].read_bytes())
    raw[-100] ^= 1
    (tmp_path / "damaged").write_bytes(raw)
    status, out, err = run("inspect", tmp_path / "damaged")
    assert (status, out) == (2, "")
    assert "damaged: its checksum does not match its bytes" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """The packaged checkpoint's first layers, two SWA, one CSA, one HCA; the others count as draft layers."""
    folder, tiny = tmp_path_factory.mktemp("four"), cli.packaged_checkpoint()
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
    return folder


def test_a_small_run_shows_its_cache_step_by_step(run, four_layers, tmp_path):
    picture = tmp_path / "state.svg"
    text = "def main(): pass\n" * 8  # 136 bytes
    status, out, err = run(
        "inspect", four_layers, "--run", text, "--tokens", "105,109", "--steps", 1, "--picture", picture
    )
    assert (status, err) == (0, "")
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles == [
        "prefill of 136 tokens in slot 0",
        "prefill of 2 tokens in slot 1",
        "decode step 1: one token in every slot",
        "fork of slot 0 into slot 2",
        "release of slot 0",
    ]
    decoded = out.split("\n\n")[2].splitlines()
    assert decoded[1:8] == [
        "  A  slot 0, 137 tokens",
        "     ring  128 of 128 rows hold tokens 9 to 136, the next goes to row 9",
        "     tail  csa: 1 of 4 rows holds token 136",
        "     tail  csa lane a: 5 of 8 rows hold tokens 132 to 136",
        "     tail  hca: 9 of 128 rows hold tokens 128 to 136",
        "     csa   34 entries; blocks: 0, 1",
        "     hca   1 entry; blocks: 0",
    ]
    assert decoded[-2:] == ["  csa blocks  AA....  4 of 6 free", "  hca blocks  A.....  5 of 6 free"]
    forked, released = out.split("\n\n")[3:5]
    assert "     block 0 is shared by A and C" in forked
    assert "  csa blocks  *AC...  3 of 6 free" in forked
    assert "  csa blocks  C.C...  4 of 6 free" in released
    drawn = ElementTree.fromstring(picture.read_text())
    words = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    for title in (*titles, "tail csa lane a", "A  slot 0, 137 tokens", "132–136", "136", "empty"):
        assert title in words
    assert words.count("AC") == 2  # one block of each kind is shared


def test_states_go_to_stdout_without_a_model(run, four_layers, monkeypatch):
    """As JSON, and as text: to stdout, whatever stderr is."""
    state = Occupancy((), (PoolState("csa", ((), (0,)), (0, 3), 32),))
    monkeypatch.setattr(small_run, "small_run", lambda *arguments: iter([("first", state)]))
    status, out, _ = run("inspect", four_layers, "--run", "x", "--json")
    pool = {"kind": "csa", "owners": [[], [0]], "filled": [0, 3], "entries_per_block": 32}
    assert (status, json.loads(out)) == (0, {"steps": [{"step": "first", "slots": [], "pools": [pool]}]})
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if stderr were a terminal
    status, out, _ = run("inspect", four_layers, "--run", "x")
    assert (status, out.splitlines()[0]) == (0, "first")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--picture", "a.svg"), "--picture draws the states of a run: give a prompt with --run"),
        (("--run", "x", "--picture", "/nowhere/a.svg"), "/nowhere/a.svg cannot be written: no such file or directory"),
        (("--run", "x", "--picture", "a.bmp"), "--picture a.bmp: expected the name of an .svg file"),
        (("--run", ""), "prompt 1 is empty: expected at least one token"),
        (("--tokens", "300"), "prompt 1 has token ids from 300 to 300: expected 0 to 255"),
        (("--run", "x" * 4090, "--steps", 9), "4090 tokens and 9 steps: the model has 4096 positions"),
    ],
)
def test_runs_that_cannot_be_are_one_sentence_and_status_2(run, four_layers, arguments, words):
    status, out, err = run("inspect", four_layers, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
