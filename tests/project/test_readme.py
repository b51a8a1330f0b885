"""The README: its code runs, its numbers are those of the code, its files are there."""

import ast
import pathlib
import re
import runpy
import xml.etree.ElementTree

import numpy as np

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


def test_text_from_the_packaged_checkpoint(capsys):
    _run(_one_with("from_pretrained"))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines] == ["b'", "b'"]
    # They are prompts that this checkpoint continues with code, not with blanks.
    assert all(len(ast.literal_eval(line).replace(b" ", b"")) > 8 for line in lines)


def test_it_is_read_in_five_minutes():
    assert TEXT.count("\n") <= 120
    assert len(CODE) == 2


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert "docs/state.svg" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_picture_is_well_formed_and_what_its_script_draws():
    svg = (ROOT / "docs" / "state.svg").read_text()
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    assert runpy.run_path(str(ROOT / "docs" / "draw_state.py"))["draw"]() == svg
