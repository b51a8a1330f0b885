"""`import dsv4_jax` offers every name that the README, the docs and the examples use."""

import pathlib
import re

import pytest

import dsv4_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("name", dsv4_jax.__all__)
def test_the_front_offers(name):
    assert getattr(dsv4_jax, name).__name__ == name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readers_import_from_the_front_alone(page):
    assert re.findall(r"^\s*(?:from|import) dsv4_jax\.\S+", page.read_text(), re.MULTILINE) == []
