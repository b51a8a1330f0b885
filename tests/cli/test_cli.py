"""The command line, in process on a checkpoint of one layer, and as a program where that matters."""

import errno
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import jax
import pytest
from programs import start_command_line

import dsv4_jax
from dsv4_jax import cli
from dsv4_jax.cli.errors import describe
from dsv4_jax.cli.loading import keep_programs
from dsv4_jax.files.written_whole import CannotWriteError, written_whole


def test_text_goes_to_stdout_and_the_summary_to_stderr(run, one_layer):
    status, out, err = run("generate", "--checkpoint", one_layer, "-n", 20, "import os")
    assert status == 0
    text = out.removesuffix("\n")
    model = dsv4_jax.from_pretrained(one_layer)
    (tokens,) = dsv4_jax.generate(model, [list(b"import os")], 20, stop_tokens=model.config.eos_token_ids)
    assert text == bytes(tokens).decode(errors="replace")
    assert "9 prompt tokens" in err
    assert f"{len(tokens)} new tokens" in err
    assert "fp8 records, nvfp4 indexer keys" in err


def test_json_is_one_object_and_alone_on_stdout(run, one_layer, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"def f(")
    prompts = ["import os", "--tokens", "100, 101", "--file", path]
    status, out, err = run("generate", "--checkpoint", one_layer, "-n", 20, "--json", "-q", *prompts)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert [result["prompt"] for result in report["results"]] == [list(b"import os"), list(b"def f("), [100, 101]]
    assert report["prompt_tokens"] == 17
    assert report["new_tokens"] == sum(len(result["tokens"]) for result in report["results"])
    assert report["cache"]["records"] == "fp8"
    assert report["cache"]["bytes"] > 0
    assert set(report["seconds"]) == {"load", "compile", "prefill", "decode"}
    assert all(rate > 0 for rate in report["tokens_per_second"].values())
    for result in report["results"]:
        assert result["text"] == bytes(result["tokens"]).decode(errors="replace")
        assert not result["stopped"]


def test_samples_and_drafts(run, one_layer):
    """Two samples of each prompt, with drafts: what Python gives without them, and how many were accepted."""
    options = ["--checkpoint", one_layer, "-n", 20, "--temperature", "0.5", "--seed", 3, "--samples", 2, "--draft", 2]
    status, out, _ = run("generate", *options, "--json", "-q", "ababab", "x")
    assert status == 0
    report = json.loads(out)
    model = dsv4_jax.from_pretrained(one_layer)
    for seed in (3, 4):
        expected = dsv4_jax.generate(
            model, [list(b"ababab"), list(b"x")], 20, temperature=0.5, seed=seed, stop_tokens=model.config.eos_token_ids
        )
        assert [result["tokens"] for result in report["results"][seed - 3 :: 2]] == expected
    assert [bytes(result["prompt"]) for result in report["results"]] == [b"ababab", b"ababab", b"x", b"x"]
    assert report["prompt_tokens"] == 7
    assert 0 < report["drafts"]["accepted"] <= report["drafts"]["drafted"]
    _, out, err = run("generate", *options, "ababab", "x")
    assert [line for line in out.split("\n") if line.startswith("---")] == [
        f"--- prompt {i}, sample {j}" for i in (1, 2) for j in (1, 2)
    ]
    assert f"{report['drafts']['accepted']} of {report['drafts']['drafted']} drafts accepted" in err


def test_several_prompts_are_shown_one_after_the_other(run, one_layer):
    status, out, _ = run("generate", "--checkpoint", one_layer, "-n", 4, "--echo", "import os", "def f(", "x")
    assert status == 0
    lines = out.split("\n")
    assert lines[0] == "--- prompt 1"
    assert lines[1].startswith("import os")
    assert "--- prompt 3" in lines


def test_stops_at_the_end_of_text_unless_told_not_to(run, one_layer, monkeypatch):
    asked = []

    def stream(model, prompts, max_new_tokens, *, stop_tokens, **options):
        asked.append(tuple(stop_tokens))
        yield from (_chunk([[65]]), _chunk([[0]]))

    monkeypatch.setattr(dsv4_jax, "stream", stream)
    _, out, _ = run("generate", "--checkpoint", one_layer, "--json", "x")
    (result,) = json.loads(out)["results"]
    assert result["stopped"]
    run("generate", "--checkpoint", one_layer, "--ignore-eos", "x")
    assert asked == [(0,), ()]


def _chunk(tokens):
    from dsv4_jax.decode import Chunk

    return Chunk(tokens, None, 1)


def test_bytes_that_are_not_text_are_replaced_and_split_characters_joined(run, one_layer, monkeypatch):
    euro = "€".encode()
    chunks = [[*euro[1:2]], [*euro[2:], 0xFF], [*euro[:2]]]
    monkeypatch.setattr(dsv4_jax, "stream", lambda *_, **__: (_chunk([tokens]) for tokens in chunks))
    status, out, _ = run("generate", "--checkpoint", one_layer, "--tokens", f"97,{euro[0]}", "--echo")
    assert (status, out) == (0, "a€\ufffd\ufffd\n")


def test_no_new_tokens_is_nothing_to_do(run, one_layer, monkeypatch):
    """But loading, in a thread of its own: in JAX's hook of the garbage collection the main one would lose a Ctrl-C."""
    threads, load = [], dsv4_jax.from_pretrained

    def from_pretrained(*arguments, **options):
        threads.append(threading.current_thread())
        return load(*arguments, **options)

    monkeypatch.setattr(dsv4_jax, "from_pretrained", from_pretrained)
    status, out, _ = run("generate", "--checkpoint", one_layer, "-n", 0, "--json", "x")
    assert status == 0
    assert json.loads(out)["results"][0]["tokens"] == []
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command"),
        (["generate"], "there is no prompt"),
        (["generate", "--cache", "fp7", "x"], "'fp7' is not one of 'fp8', 'fp8_ue8m0', 'bf16', 'fp32'"),
        (["generate", "--max-new-tokens", "-1", "x"], "--max-new-tokens"),
        (["generate", "--temperature", "-1", "x"], "--temperature"),
        (["generate", "--seed", "4294967296", "x"], "--seed"),
        (["generate", "--nonsense", "x"], "(see dsv4-jax generate --help)"),
        (["generate", "--tokens", "1,b"], "expected token ids such as 1,2,3"),
        (["generate", "--tokens", "1,256"], "expected 0 to 255"),
        (["generate", "--tokens", "1," + "9" * 30], "expected token ids such as 1,2,3"),
        (["generate", "--tokens", "1_0"], "--tokens '1_0': expected token ids such as 1,2,3"),
        (["generate", "--file", "/dev/zero"], "--file /dev/zero: expected a prompt of at most 64 MiB, got more"),
        (["generate", ""], "prompt 1 is empty"),
        (["generate", "--file", "/nowhere/at/all"], "no such file"),
        (["generate", "--checkpoint", "/nowhere/at/all", "x"], "/nowhere/at/all"),
        (["generate", "--checkpoint", __file__, "x"], "test_cli.py is a file: expected the folder of a checkpoint"),
        (["generate", "--samples", "5000", "x"], "--samples"),
        (["generate", "-n", "5000", "x"], "prompt 1 has 1 tokens and 5000 shall follow: the model has 4096 positions"),
        (["generate", "--temperature", "nan", "x"], "--temperature"),
    ],
)
def test_bad_usage_is_one_sentence_and_status_2(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("dsv4-jax: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("OOM:\n no block"), MemoryError(), KeyError("surprise")])
def test_a_failure_is_one_sentence_and_status_1(run, one_layer, monkeypatch, error):
    def stream(*_, **__):
        raise error
        yield

    monkeypatch.setattr(dsv4_jax, "stream", stream)
    status, out, err = run("generate", "--checkpoint", one_layer, "x")
    assert (status, out) == (1, "")
    assert err.startswith("dsv4-jax: ")
    assert err.count("\n") == 1


def test_a_text_needs_a_tokenizer_where_tokens_are_not_bytes(tmp_path):
    with pytest.raises(cli.InputError, match=r"no tokenizer.json and a vocabulary of 300: .* --tokens"):
        cli.make_codec(tmp_path, 300).encode(b"x")
    assert cli.make_codec(tmp_path, 300).decoder([1])([7, 299]) == "7 299 "


def test_a_tokenizer_json_is_used_and_its_text_streams_whole_characters(tmp_path):
    import tokenizers

    words = {symbol: i for i, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = cli.make_codec(tmp_path, 256)
    prompt, tokens = codec.encode(b"f("), codec.encode("a €b".encode())
    decode = codec.decoder(prompt)
    pieces = [decode([token]) for token in tokens]
    assert pieces == ["a", " ", "", "", "€", "b"]
    assert decode(tokens[2:3], True) == "\ufffd"
    with pytest.raises(cli.InputError, match="not UTF-8"):
        codec.encode(b"\xff")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(cli.InputError, match="is not a tokenizer"):
        cli.make_codec(tmp_path, 256)


def test_a_tokenizer_takes_the_whole_prompt_and_starts_as_its_configuration_says(tmp_path, monkeypatch):
    import tokenizers

    words = {"<s>": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "b"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=4, pad_id=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert cli.make_codec(tmp_path, 3).encode(b"a b a") == [1, 2, 1]
    options = tmp_path / "tokenizer_config.json"
    for written, prompt, ids in (
        ({"add_bos_token": True, "bos_token": "<s>"}, b"a b", [0, 1, 2]),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, b"<s> a", [0, 1]),
        ({"add_bos_token": True, "bos_token": "<s>"}, b"", []),
        ({"add_bos_token": True, "bos_token": None}, b"a", [1]),
        ({"add_bos_token": False, "bos_token": "<s>"}, b"a", [1]),
    ):
        options.write_text(json.dumps(written))
        assert cli.make_codec(tmp_path, 3).encode(prompt) == ids
    for token in ("<x>", 7, ["<s>"]):
        options.write_text(json.dumps({"add_bos_token": True, "bos_token": token}))
        with pytest.raises(cli.InputError, match=r"tokenizer_config.json: bos_token is .*: expected a token of tok"):
            cli.make_codec(tmp_path, 3)
    monkeypatch.setattr("dsv4_jax.cli.prompts.MAX_FILE_BYTES", 100)
    with pytest.raises(cli.InputError, match="expected a tokenizer of at most 0 MiB, got more"):
        cli.make_codec(tmp_path, 3)


def test_formats_offered_are_those_of_the_cache():
    from dsv4_jax.cache.formats import INDEXER_FORMATS, RECORD_FORMATS

    assert {str(name) for name in cli.CacheDtype} == set(RECORD_FORMATS)
    assert {str(name) for name in cli.IndexerDtype} == set(INDEXER_FORMATS)


def test_compile_time_counts_nested_spans_once():
    clock = cli.CompileClock()
    clock._spans = [(1.0, 2.0), (1.2, 1.4), (1.5, 3.0), (9.0, 10.0)]
    assert clock.seconds(0.0, 9.5) == pytest.approx(2.5)
    assert clock.seconds(1.5, 2.5) == pytest.approx(1.0)


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output = cli.TextOutput()
    output.write("a\x1b[2J\tb\x9b\n")
    assert capsys.readouterr().out == "a\ufffd[2J\tb\ufffd\n"


def test_ctrl_c_ends_it_at_once_and_quietly():
    # The checkpoint of seven layers: the signal comes while it compiles.
    process = start_command_line("generate", "-n", 8, "--ignore-eos", "import os", JAX_LOG_COMPILES="1")
    for line in process.stderr:
        if "prefill_step" in line:
            break
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(one_layer):
    process = start_command_line("generate", "--checkpoint", one_layer, "-n", 200, "--ignore-eos", "import os")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in err
    assert "Exception" not in err


def test_installed_program_shows_help():
    program = pathlib.Path(sys.executable).with_name("dsv4-jax")
    if not program.exists():
        pytest.skip("the package is not installed beside this interpreter")
    result = subprocess.run([program, "generate", "--help"], capture_output=True, text=True, check=True)
    assert "--max-new-tokens" in result.stdout
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _write_half(path):
    with written_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_what_the_system_says_goes_without_its_numbers():
    for error, words, status in (
        (PermissionError(errno.EACCES, "Permission denied", "/x/config.json"), "/x/config.json: permission denied", 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "/x: is a directory", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device", 1),
        (FileNotFoundError("/x: no such file; expected one"), "/x: no such file; expected one", 2),
        (ValueError("\x1b[2J\x9b a\n b"), "\ufffd[2J\ufffd a b", 2),
    ):
        assert describe(error) == (words, status)


def test_closed_streams_are_empty_ones():
    """As by `>&-` in a shell."""
    for arguments, closed, words, status in (
        (("plan", "--config", "flash", "--memory", "80GiB"), "stdout", "", 0),
        (("plan", "--config", "nowhere", "--memory", "80GiB"), "stderr", "", 2),
        (("generate", "--file", "-"), "stdin", "dsv4-jax: prompt 1 is empty: expected at least one token\n", 2),
    ):
        process = start_command_line(*arguments, first=f"sys.{closed} = None")
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (status, words)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.bin"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        _write_half(path)
    assert path.read_text() == "before"
    with written_whole(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
    for place, words in (
        (tmp_path / "x" / "y", "no such file"),
        (tmp_path, "it is a folder"),
        ("/dev/null", "it is no regular file"),
    ):
        with pytest.raises(CannotWriteError, match=f"{place} cannot be written: {words}"):
            _write_half(place)


def test_help_needs_no_jax():
    """So it comes at once, and Ctrl-C before JAX is there is caught like any other."""
    for arguments in (
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("generate", "inspect", "plan", "quantize")),
    ):
        process = start_command_line(*arguments, first="sys.modules['jax'] = sys.modules['flax'] = None")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), arguments
        assert out


def test_every_public_name_is_there():
    assert set(dsv4_jax.__all__) == set(dsv4_jax._MODULES)
    for name in dsv4_jax.__all__:
        assert getattr(dsv4_jax, name).__name__ == name
        assert name in dir(dsv4_jax)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        dsv4_jax.nonsense  # noqa: B018


def test_a_platform_that_is_not_here_is_one_sentence(run, one_layer, monkeypatch):
    monkeypatch.setattr("jax.devices", Mock(side_effect=AssertionError))
    status, out, err = run("generate", "--checkpoint", one_layer, "-q", "a")
    assert (status, out) == (2, "")
    assert err.startswith("dsv4-jax: JAX")
    assert "Assertion" in err or "finds no such device here: expected cpu" in err
    assert err.count("\n") == 1


def test_compiled_programs_are_kept_where_nothing_else_is_said(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    folder = tmp_path / "dsv4_jax" / "compiled"
    try:
        for given, home, expected in (
            ("elsewhere", tmp_path, "elsewhere"), (None, tmp_path, str(folder)), (None, tmp_path / "file", None),
        ):  # fmt: skip
            (tmp_path / "file").write_text("")
            monkeypatch.setenv("XDG_CACHE_HOME", str(home))
            jax.config.update(names[0], given)
            keep_programs(True)
            assert getattr(jax.config, names[0]) == expected
        assert folder.is_dir()
        keep_programs(False)
        assert not getattr(jax.config, names[2])
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
