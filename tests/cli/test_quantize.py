"""`dsv4-jax quantize`: what it writes, says and refuses, and that Ctrl-C leaves nothing."""

import json
import pathlib
import signal
import time

from programs import start_command_line

from dsv4_jax.files.safetensors_file import open_checkpoint

SHARP = pathlib.Path(__file__).parents[1] / "data" / "sharp_dsv4"


def test_it_converts_and_says_what_it_did(run, tmp_path):
    target = tmp_path / "out"
    status, out, err = run("quantize", SHARP, target, "--shard-size", "600kB")
    assert (status, out) == (0, "")
    assert "42 weights in FP8, 90 in FP4, 97 other tensors" in err
    checkpoint = open_checkpoint(target)
    assert f"MiB in {len(checkpoint.files)} files" in err
    assert len(checkpoint.files) > 2
    status, out, err = run("quantize", SHARP, tmp_path / "one", "--json", "-q")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["fp8"], report["fp4"], report["draft"]) == (42, 90, 0)
    assert report["files"] == ["model-00001-of-00001.safetensors"]


def test_what_cannot_be_done_is_one_sentence_and_status_2(run, tmp_path):
    for arguments, words in (
        ((tmp_path / "nowhere", tmp_path / "out"), "no such file; expected a config.json"),
        ((SHARP, SHARP), "exists already; expected the name of a new folder"),
        ((SHARP, tmp_path / "out", "--shard-size", "much"), "--shard-size 'much': expected a number of bytes"),
        ((SHARP, tmp_path / "out", "--shard-size", "0"), "--shard-size 0: expected at least one byte"),
    ):
        status, out, err = run("quantize", *arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert words in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path):
    """A real signal, in the middle of writing: the temporary folder is there, and then nothing is."""
    slowly = (
        "import time; from dsv4_jax.model.files import released_form as r; q = r.quantise\n"
        "r.quantise = lambda *a: (time.sleep(0.1), q(*a))[1]"
    )
    program = start_command_line("quantize", SHARP, tmp_path / "out", first=slowly)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.partial/*.safetensors")):
        assert time.monotonic() < deadline
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60)[1] == ""
    assert program.returncode == 130
    assert list(tmp_path.iterdir()) == []
