"""Imports go one way: model -> cache -> ops. Nothing below the model imports Flax."""

import ast
import pathlib

import pytest

import dsv4_jax

PACKAGE = pathlib.Path(dsv4_jax.__file__).parent
MAY_IMPORT = {
    "ops": {"ops"},
    "files": {"files"},
    "cache": {"cache", "ops", "files"},
    "model": {"model", "cache", "ops", "files"},
    "decode": {"decode", "model", "cache", "ops"},
}


def imported(file):
    """What a file imports, by absolute name: "jax", "dsv4_jax.ops.nn.rope"."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = (dsv4_jax.__name__, *file.relative_to(PACKAGE).parts[:-1])
            base = ".".join(above[: len(above) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        names = imported(file)
        rooms = {(*name.split("."), "")[1] for name in names if name.split(".")[0] == "dsv4_jax"}
        assert rooms <= MAY_IMPORT[room], file
        if room in ("ops", "files", "cache"):
            assert not any(name.split(".")[0] == "flax" for name in names), file


def test_the_host_touches_no_device_array():
    for file in (PACKAGE / "cache" / "host").rglob("*.py"):
        assert not any(name.split(".")[0] == "jax" for name in imported(file)), file


def test_no_module_imports_itself_by_way_of_others():
    files = {
        ".".join(("dsv4_jax", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in PACKAGE.rglob("*.py")
    }
    arrows = {name: set() for name in files}
    for name, file in files.items():
        for target in imported(file):
            module = target if target in files else target.rpartition(".")[0]
            arrows[name] |= {module} & files.keys() - {name}
    while leaves := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert not arrows
