"""The pages in docs/: what they quote, count and promise is so."""

import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from flax import nnx
from small_model import SMALL

from dsv4_jax import DSV4Config, build_schedule
from dsv4_jax.cache.formats import key_bytes, record_format
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.schema import BLOCK_SIZE_ORIGINAL_TOKENS, build_schema
from dsv4_jax.model.transformer import DSV4Model

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:dsv4_jax|ffi|tests|scripts|docs|examples)/[\w./-]+)`", text)
    commands = re.findall(r"^(scripts/\w+)", text, re.MULTILINE)
    missing = [name for name in links if not (page.parent / name).exists()]
    assert missing + [name for name in named + commands if not (ROOT / name).exists()] == []


def test_quoted_code_is_that_of_the_files():
    quotes = re.findall(
        r"^`([\w./]+)`\n```\w+\n(.*?)```", (ROOT / "docs" / "ffi-op.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(quotes) == 8
    assert [name for name, code in quotes if code not in (ROOT / name).read_text()] == []


def test_the_code_of_the_page_on_the_state_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "state.md").read_text(), re.DOTALL)
    assert code.count("assert ") == 3
    exec(compile(code, "docs/state.md", "exec"), {})


def _table(text: str, title: str) -> list[list[str]]:
    lines = text[text.index(title) :].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def test_errors_of_the_records_are_those_measured():
    measured = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "records.py"))["measure"]()
    rows = _table((ROOT / "docs" / "records.md").read_text(), "| format | normal, mean")
    assert {name.replace("`", "") for name, *_ in rows} == set(measured)
    for name, *errors in rows:
        expected = list(measured[name.replace("`", "")].values())[1:]
        assert [float(error.removesuffix(" %")) for error in errors] == pytest.approx(
            [100 * error for error in expected], abs=0.0051
        ), name


def test_sizes_of_the_records_are_those_of_the_code():
    from dsv4_jax.cache.formats import INDEXER_FORMATS, RECORD_FORMATS, key_bytes

    text = (ROOT / "docs" / "records.md").read_text()
    records = {row[0].strip("`"): int(row[-1].replace(",", "")) for row in _table(text, "| format | 448 values")}
    keys = {row[0].strip("`"): int(row[-1]) for row in _table(text, "| format | 128 values")}
    assert records == {name: form.record_bytes(448, 64) for name, form in RECORD_FORMATS.items()}
    assert keys == {name: key_bytes(name, 128) for name in INDEXER_FORMATS}


def _code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_tutorial_runs():
    blocks = _code("tutorial.md")
    assert len(blocks) == 7
    exec(compile("\n".join(blocks), "docs/tutorial.md", "exec"), {})


def test_a_loop_of_ones_own_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prefill, moved, loop = _code("loop.md")
    names: dict = {}
    exec(compile(prefill, "docs/loop.md", "exec"), names)
    window, entries = (np.asarray(x) for x in names["seen"])
    positions = np.arange(256)
    np.testing.assert_array_equal(window, np.minimum(positions + 1, 128))
    np.testing.assert_array_equal(entries, (positions + 1) // 128)
    assert names["manager"].active_slots == []
    exec(compile(moved, "docs/loop.md", "exec"), names)
    # One layer: the loop is tested elsewhere, and XLA takes seconds a layer.
    config = SMALL.replace(vocab_size=256, num_hidden_layers=1, compress_ratios=(4,))
    names = {"model": DSV4Model(config, rngs=nnx.Rngs(0))}
    exec(compile(loop, "docs/loop.md", "exec"), names)
    assert capsys.readouterr().out == "0 length\n1 aborted\n"
    assert names["loop"].manager.active_slots == []


def test_the_page_of_every_name_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == page, "python docs/make_api.py writes it anew"


def _rows() -> list[list[str]]:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "records.md").read_text().splitlines()
        if "MiB |" in line
    ]
    assert len(rows) == 5
    return rows


@pytest.mark.parametrize("row", _rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_costs_in_the_table_are_those_of_the_cache(row):
    cache_dtype, indexer_dtype, *numbers = row
    expected = [
        record_format(cache_dtype).record_bytes(448, 64),
        key_bytes(indexer_dtype, 128),
    ]
    for config in (DSV4Config.flash(), DSV4Config.pro()):
        schemas = tuple(
            build_schema(config, spec, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype)
            for spec in build_schedule(config)
        )
        blocks = dict.fromkeys(("csa", "hca"), 1)
        cache = jax.eval_shape(lambda s=schemas, b=blocks: KVCache.allocate(s, 1, b, b))
        paged, state = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
            for part in (cache.paged, cache.state)
        )
        expected += [round(paged / BLOCK_SIZE_ORIGINAL_TOKENS, 1), round(state / 2**20, 2)]
    assert [float(number.replace(",", "").removesuffix(" MiB")) for number in numbers] == expected
