"""The pages in docs/: what they quote, count and promise is so."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_readme_and_the_page_on_records_agree_on_bits_per_byte():
    page, readme = ((ROOT / name).read_text() for name in ("docs/records.md", "README.md"))
    rows = _table(page, "| records + keys |")
    assert len(rows) == 5
    assert rows == _table(readme, "| records + keys |")[:5]
