"""The README: its code runs, its numbers are those of the code, its files are there."""

import pathlib
import re
import runpy
import xml.etree.ElementTree

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
TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def _run(code: str, **given) -> dict:
    names: dict = given
    exec(compile(code, "README.md", "exec"), names)
    return names


def _one_with(words: str) -> str:
    (code,) = [code for code in CODE if words in code]
    return code


def test_first_screen_runs_and_updates_the_cache_in_place():
    code = _one_with("def step(")
    names = _run(code)
    manager = names["manager"]
    assert manager.active_slots == [0, 1]
    np.testing.assert_array_equal(np.asarray(manager.state_pools[0].swa_pos)[:2, :5], [[0, 1, 2, 3, -1]] * 2)
    # All values were 1, so the window's average is 1.
    np.testing.assert_allclose(names["out"], 1.0, rtol=1e-6)
    # In place: what comes out lies where what went in lay, all of it.
    plan = manager.plan_step(names["slots"], [4, 4])
    compiled = names["step"].lower(manager.cache, plan, np.ones((2, 512), np.float32), np.ones((2, 512), np.float32))
    assert compiled.compile().memory_analysis().alias_size_in_bytes == manager.memory_bytes()
    # Everything before that code fits on a screen.
    assert TEXT[: TEXT.index(code)].count("\n") < 20


def test_prefill_of_your_own_runs():
    names = _run(_one_with("def prefill("))
    window, entries = (np.asarray(x) for x in names["seen"])
    positions = np.arange(256)
    np.testing.assert_array_equal(window, np.minimum(positions + 1, 128))
    np.testing.assert_array_equal(entries, (positions + 1) // 128)
    assert names["manager"].active_slots == []


def test_loop_of_requests_runs(capsys):
    # One layer: the loop is tested elsewhere, and XLA takes seconds a layer.
    config = SMALL.replace(vocab_size=256, num_hidden_layers=1, compress_ratios=(4,))
    model = DSV4Model(config, rngs=nnx.Rngs(0))
    names = _run(_one_with("loop.submit("), model=model)
    assert capsys.readouterr().out == "0 length\n1 aborted\n"
    assert names["loop"].manager.active_slots == []


def test_every_block_of_python_compiles():
    assert len(CODE) == 4
    for code in CODE:
        compile(code, "README.md", "exec")


def _rows() -> list[list[str]]:
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if "MiB |" in line]
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


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert "docs/state.svg" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_picture_is_well_formed_and_what_its_script_draws():
    svg = (ROOT / "docs" / "state.svg").read_text()
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    assert runpy.run_path(str(ROOT / "docs" / "draw_state.py"))["draw"]() == svg
