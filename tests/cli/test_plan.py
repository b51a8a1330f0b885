"""`dsv4-jax plan`, in process."""

import functools
import json
import math
import struct
import sys

import jax
import pytest
from flax import nnx

import dsv4_jax
from dsv4_jax import DSV4Config, KVCacheManager, cli
from dsv4_jax.cli.sizes import parse_bytes, show_bytes


@pytest.fixture
def run(run):
    """run(...) -> (exit status, stdout, stderr) of `dsv4-jax plan ...`."""
    return functools.partial(run, "plan")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config.json of five layers."""
    path = tmp_path_factory.mktemp("small") / "config.json"
    config = DSV4Config.flash().replace(num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128))
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    path.write_text(json.dumps(fields))
    assert DSV4Config.from_hf(path) == config
    return path


def test_a_planned_cache_is_as_large_as_the_real_one(run, small):
    status, out, _ = run(
        "--config", small, "--memory", "64MiB", "--context", 600, "--concurrency", 3, "--json",
        "--cache", "fp8_ue8m0", "--indexer", "nvfp4", "--max-rollback", 2, "--hca-tail", "running",
    )  # fmt: skip
    report = json.loads(out)
    assert status == 0
    blocks = {kind["kind"]: kind["blocks"] for kind in report["kinds"]}
    assert blocks == {"swa": 0, "csa": 15, "hca": 12}
    config = DSV4Config.from_hf(small)
    manager = KVCacheManager(
        config, config.schedule, max_concurrent_requests=3, max_context_len=600, num_blocks_per_csa_layer=blocks["csa"],
        num_blocks_per_hca_layer=blocks["hca"], cache_dtype="fp8_ue8m0", indexer_dtype="nvfp4", max_rollback=2,
        hca_tail="running",
    )  # fmt: skip
    assert report["total_bytes"] == manager.memory_bytes()
    parts = [report["state_bytes"], report["table_bytes"], *(kind["pool_bytes"] for kind in report["kinds"])]
    assert sum(parts) == report["total_bytes"]
    (chosen,) = [f for f in report["formats"] if (f["records"], f["indexer"]) == ("fp8_ue8m0", "nvfp4")]
    for name in ("total_bytes", "fits", "largest_context", "largest_concurrency", "bytes_per_token"):
        assert chosen[name] == report[name]


def test_the_table_says_what_the_object_says(run):
    arguments = ("--config", "flash", "--memory", "80GiB", "--context", 131072, "--concurrency", 16)
    status, out, err = run(*arguments)
    report = json.loads(run(*arguments, "--json")[1])
    assert (status, err) == (0, "")
    words = [
        "43 layers (2 SWA, 21 CSA, 20 HCA)", "16 requests of 131,072 tokens", "16,384 in each layer",
        f"{report['total_bytes']:,}", f"{report['bytes_per_token']:,.1f}", "The cache fits",
        f"Largest concurrency at 131,072 tokens: {report['largest_concurrency']} requests",
        "1,048,576 tokens, the model's limit", "nothing reserved",
        f"Not counted: its weights as released, {show_bytes(report['weights']['held_bytes'])}",
    ]  # fmt: skip
    assert [word for word in words if word not in out] == []
    formats = [f"{f['records']} + {f['indexer']}" for f in report["formats"]]
    costs, limits = out[out.index("side by side") :].split("\n\n")
    for table in (costs, limits):
        assert [" ".join(line.split()[:3]) for line in table.splitlines()[2:]] == formats
    assert costs.splitlines()[2].split()[3:] == ["580", "B", "72", "B", "14.30", "MiB", "3,513.6", "B"]
    assert limits.splitlines()[2].split()[3:] == ["7.09", "GiB", "yes", "1,048,576", "180"]


def test_the_table_is_whole_in_a_terminal_of_80_columns(run, monkeypatch):
    arguments = ("--config", "pro", "--memory", "8TiB", "--context", 1048576, "--concurrency", 4096)
    out = run(*arguments)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no bold
    narrow = run(*arguments)[1]
    assert [line.rstrip() for line in narrow.splitlines()] == [line.rstrip() for line in out.splitlines()]
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 80


def test_too_little_memory_is_status_1_and_says_what_is_missing_and_what_fits(run):
    arguments = ("--config", "pro", "--memory", "40GB", "--reserve", "20GB", "--context", 100000, "--concurrency", 40)
    status, out, _ = run(*arguments, "--cache", "bf16")
    report = json.loads(run(*arguments, "--cache", "bf16", "--json")[1])
    assert status == 1
    assert report["memory_bytes"] == 20 * 10**9
    assert report["missing_bytes"] == report["total_bytes"] - report["memory_bytes"] > 0
    assert f"({report['missing_bytes']:,}) are missing" in out
    assert f"Largest context of 40 requests: {report['largest_context']:,} tokens" in out
    smaller = [f"{f['records']} + {f['indexer']}" for f in report["formats"] if f["fits"]]
    assert not smaller
    status, out, _ = run(
        "--config", "pro", "--memory", "25GB", "--context", 100000, "--concurrency", 40, "--cache", "bf16"
    )
    assert status == 1
    assert "As asked for, these formats would fit: fp8 + nvfp4, fp8 + mxfp4, fp8_ue8m0 + nvfp4" in out
    out = run("--config", "pro", "--memory", "30MB", "--concurrency", 4)[1]
    assert "One request alone can have 1,411 tokens" in out
    arguments = ("--config", "pro", "--memory", "9MB")
    smallest = json.loads(run(*arguments, "--json")[1])["smallest_bytes"]
    assert f"Not even one token fits: its cache takes 21.61 MiB ({smallest:,})" in run(*arguments)[1]
    assert run("--config", "pro", "--memory", smallest, "--context", 1)[0] == 0
    assert run("--config", "pro", "--memory", smallest - 1, "--context", 1)[0] == 1


def test_weights_count_where_they_are_given(run, data, one_layer):
    arguments = ("--config", "flash", "--context", 131072, "--concurrency", 16)
    status, out, _ = run(*arguments, "--memory", "80GiB", "--weights", "flash")
    assert status == 1
    assert "It fits" not in out
    assert "It does not fit: the weights take" in out
    alone = json.loads(run(*arguments, "--memory", "80GiB", "--json")[1])
    status, out, _ = run(*arguments, "--memory", "192GB", "--weights", "flash", "--json")
    report = json.loads(out)
    published = json.loads((data / "released" / "DeepSeek-V4-Flash.json").read_text())["tensors"]
    sizes = {"F8_E4M3": 1, "I8": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I64": 8}
    stored = sum(
        count * sizes[dtype] * math.prod(shape) for name, dtype, shape, count in published if name[:4] != "mtp."
    )
    assert report["weights"]["stored_bytes"] == stored
    assert 0.99 * stored < report["weights"]["held_bytes"] < 1.02 * stored
    assert status == 0
    assert report["total_bytes"] == alone["total_bytes"]
    assert report["memory_bytes"] == 192 * 10**9 - report["weights"]["held_bytes"]
    assert "It fits, weights and cache" in run(*arguments, "--memory", "192GB", "--weights", "flash")[1]
    unnamed = run("--weights", "flash", *arguments[2:], "--memory", "192GB", "--json")[1]
    assert json.loads(unnamed) == report  # the model is the weights'

    found = json.loads(run("--config", one_layer, "--memory", "1GiB", "--weights", one_layer, "--json")[1])["weights"]
    weights = nnx.split(dsv4_jax.from_pretrained(one_layer))[1]
    assert found["held_bytes"] == sum(array.nbytes for array in jax.tree.leaves(weights))
    status, _, err = run(*arguments, "--memory", "80GiB", "--weights", "nowhere")
    assert status == 2
    assert "--weights 'nowhere': no such folder" in err


def test_the_picture_is_written_whole(run, small, tmp_path, monkeypatch):
    path = tmp_path / "plan.png"
    status, _, err = run("--config", small, "--memory", "64MiB", "--plot", path)
    assert (status, err) == (0, "")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 750)
    assert list(tmp_path.iterdir()) == [path]

    def interrupted(report, lines, temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv4_jax.cli.plan_plot.draw", interrupted)
    assert run("--config", small, "--memory", "64MiB", "--plot", path)[0] == 130
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_of_any_path_and_any_memory(run, small, tmp_path):
    folder = tmp_path / "$a_{$"  # where text is a formula, half of one is an error
    folder.mkdir()
    path = folder / "plan.svg"
    config = folder / "config.json"
    config.write_bytes(small.read_bytes())
    status, _, err = run("--config", config, "--memory", "5KiB", "--plot", path)
    assert (status, err) == (1, "")
    written = path.read_text()
    assert "<!-- memory for the cache, 5.00 KiB -->" in written
    assert f"<!-- {config}: cache of 1 request -->" in written


def test_absurd_numbers_leave_a_table_of_whole_numbers(run):
    status, out, err = run("--config", "pro", "--memory", "8191PiB", "--concurrency", 2**31 - 1, "--context", 1048576)
    assert (status, err) == (1, "")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_lines_of_the_picture_are_the_sizes_of_the_plan(small):
    from dsv4_jax.cli.plan import make_lines, make_report

    config = DSV4Config.from_hf(small)
    report = make_report(config, 1 << 30, 4096, 2, "fp8", "nvfp4", max_rollback=0, hca_tail="full")
    lines = make_lines(config, report)
    assert set(lines) == {"fp8 + nvfp4", "fp8_ue8m0 + mxfp4", "bf16 + bf16", "fp32 + fp32"}
    assert dict(lines["fp8 + nvfp4"])[4096] == report["total_bytes"]
    assert lines["fp8 + nvfp4"][-1][0] == config.max_position_embeddings


def test_formats_that_cannot_store_a_model_are_left_out(run, tmp_path):
    config = DSV4Config.flash().replace(num_hidden_layers=3, compress_ratios=(0, 4, 6), hca_ratio=6, head_dim=112)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: getattr(config, name) for name in config.__dataclass_fields__}))
    status, out, _ = run("--config", path, "--memory", "1GiB", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["block_tokens"] == 12
    assert {f["records"] for f in report["formats"]} == {"fp8", "bf16", "fp32"}
    status, _, err = run("--config", path, "--memory", "1GiB", "--cache", "fp8_ue8m0")
    assert status == 2
    assert "64" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "80GiB"], "--config"),
        (["--config", "flash"], "--memory"),
        (["--config", "flash", "--memory", "80"], None),
        (["--config", "flash", "--memory", "0"], "--memory 0: expected at least one byte"),
        (["--config", "flash", "--memory", "80XB"], "--memory '80XB': expected a number of bytes such as 80GiB"),
        (["--config", "flash", "--memory", "-1"], "--memory '-1'"),
        (["--config", "flash", "--memory", "nan"], "--memory 'nan'"),
        (["--config", "flash", "--memory", "9" * 60], "--memory '999"),
        (["--config", "flash", "--memory", "1GB", "--reserve", "1GB"], "--reserve 1GB leaves nothing of --memory 1GB"),
        (["--config", "/nowhere", "--memory", "1GB"], "--config '/nowhere': no such file; expected flash, pro, a con"),
        (["--config", "", "--memory", "1GB"], "--config '': no such file"),
        (["--config", "flash", "--memory", "8192PiB"], "--memory '8192PiB': expected less than 8192PiB"),
        (["--config", "flash", "--memory", "1GB", "--concurrency", str(2**31)], "--concurrency"),
        (["--config", "flash", "--memory", "1GB", "--max-rollback", str(2**31)], "--max-rollback"),
        (["--config", "flash", "--memory", "1GB", "--context", "1048577"], "the model has 1048576 positions"),
        (["--config", "flash", "--memory", "1GB", "--context", "0"], "--context"),
        (["--config", "flash", "--memory", "1GB", "--concurrency", "0"], "--concurrency"),
        (["--config", "flash", "--memory", "1GB", "--max-rollback", "-1"], "--max-rollback"),
        (["--config", "flash", "--memory", "1GB", "--cache", "fp7"], "'fp7' is not one of"),
        (["--memory", "1GB"], "there is no model: give --config or --weights"),
        (["--config", "flash", "--memory", "1GB", "--plot", "x.bmp"], "ends in .png, .svg, .pdf"),
        (["--config", "flash", "--memory", "1GB", "--plot", "/nowhere/x.png"], "/nowhere/x.png cannot be written"),
    ],
)
def test_bad_usage_is_one_sentence_and_status_2(run, arguments, words):
    status, out, err = run(*arguments)
    if words is None:  # few bytes, but bytes
        assert status == 1
        return
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_without_matplotlib_it_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("--config", "flash", "--memory", "80GiB", "--plot", "x.png")
    assert status == 2
    assert "pip install matplotlib" in err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("85899345920", 85899345920), ("1.5TiB", 3 * 2**39),
        ("12 kB", 12000), ("7KB", 7000), ("3B", 3), ("0.5KiB", 512), ("2PB", 2 * 10**15),
    ],
)  # fmt: skip
def test_sizes_are_read(text, count):
    assert parse_bytes(text, "--memory") == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "80G", "80gib", "1e9", "1,000", "٣", "0x10", "inf", "1.GB", "--", "80GiB!"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(cli.InputError, match="expected a number of bytes such as"):
        parse_bytes(text, "--memory")


def test_sizes_are_shown():
    shown = [show_bytes(n) for n in (0, 1023, 1024, 1536 * 1024, 2**30, 5 * 2**50)]
    assert shown == ["0 B", "1023 B", "1.00 KiB", "1.50 MiB", "1.00 GiB", "5,120.00 TiB"]


def test_devices_of_one_request_divide_its_heads(run):
    """Each has its cache; what is left for caches is that of fewer shards."""
    arguments = (
        "--config", "pro", "--weights", "pro", "--memory", "141GB", "--concurrency", 8, "--json", "--devices", 8,
    )  # fmt: skip
    (_, apart, _), (_, together, _) = run(*arguments), run(*arguments, "--model-devices", 4)
    apart, together = json.loads(apart), json.loads(together)
    assert (apart["concurrency"], together["concurrency"]) == (1, 4)
    saved = apart["weights"]["held_bytes"] - together["weights"]["held_bytes"]
    config = DSV4Config.pro()
    heads, hidden, outputs = config.num_attention_heads, config.hidden_size, config.o_groups * config.o_lora_rank
    per_layer = heads * config.head_dim * (config.q_lora_rank + config.o_lora_rank) + outputs * hidden
    per_layer += 3 * hidden * config.moe_intermediate_size * config.n_shared_experts
    assert saved == pytest.approx(0.75 * per_layer * config.num_hidden_layers, rel=1e-3)  # scales are the rest
    status, _, err = run("--weights", "pro", "--memory", "141GB", "--devices", 16, "--model-devices", 16)
    assert status == 2  # scales are of 128 rows
    assert "--model-devices is 16: layers.0.ffn.shared_experts.w1.scale has shape (24, 56)" in err
    status, _, err = run("--config", "flash", "--weights", "pro", "--memory", "141GB", "--devices", 256)
    assert status == 2
    assert "--devices is 256: expected a number that divides 384 experts" in err
    status, _, err = run(*arguments, "--model-devices", 3)
    assert status == 2
    assert "--model-devices is 3: expected a number that divides 8 devices and 16 output groups" in err
