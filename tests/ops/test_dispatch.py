"""Which form of an operation is traced, where several could run."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.ops import dispatch


@pytest.fixture
def traced():
    """What was traced, and functions that say so."""
    names = []

    def form(name):
        def run(x):
            names.append(name)
            return x + 1

        return run

    return names, form


def test_only_forms_of_platforms_that_are_here_are_traced(monkeypatch, traced):
    names, form = traced
    native, plain = form("native"), form("jnp")
    x = jnp.zeros(2)
    for here, forms, expected in (
        ({"cpu"}, {"cpu": native}, ["native"]),
        ({"cpu"}, {"cuda": native}, ["jnp"]),
        ({"cpu", "cuda"}, {"cpu": native, "cuda": native}, ["native"]),
        ({"cpu", "cuda"}, {"cuda": native}, ["jnp", "native"]),
    ):
        monkeypatch.setattr(dispatch, "platforms", lambda here=here: frozenset(here))
        names.clear()
        jax.make_jaxpr(lambda x, forms=forms: dispatch.on_platform(x, default=plain, **forms))(x)
        assert sorted(names) == expected
        names.clear()
        assert dispatch.on_platform(x, default=plain, **forms)[0] == 1


def test_a_checkout_takes_the_libraries_of_an_installation_of_the_same_code(tmp_path):
    """Python imports the package from the folder it runs in, which has none."""
    package = pathlib.Path(dispatch.__file__).parents[1]
    checkout, installed = tmp_path / "checkout", tmp_path / "site"
    for folder in (checkout, installed):
        shutil.copytree(
            package, folder / "dsv4_jax", ignore=shutil.ignore_patterns("__pycache__", "_lib", "data", "model", "cli")
        )
        with (folder / "dsv4_jax" / "ops" / "segments.py").open("a") as file:
            file.write("# not the code that the tests run on, which may be installed too\n")
    (installed / "dsv4_jax" / "_lib").mkdir()
    code = "from dsv4_jax.ops import dispatch; print(dispatch.library_dirs()); dispatch.available()"

    def run():
        environment = {**os.environ, "PYTHONPATH": f"{checkout}:{installed}", "JAX_PLATFORMS": "cpu"}
        environment.pop(dispatch.LIBRARY_DIR_VARIABLE, None)
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return result.stdout, result.stderr

    out, err = run()
    assert str(installed / "dsv4_jax" / "_lib") in out
    with (installed / "dsv4_jax" / "ops" / "segments.py").open("a") as file:
        file.write("# other code\n")
    out, err = run()
    assert str(installed) not in out
    assert f"a checkout in the way of the installation in {installed}, whose code differs: run elsewhere" in err


def test_the_platforms_are_those_of_jax():
    assert "cpu" in dispatch.platforms()
    assert ("cuda" in dispatch.platforms()) == (jax.default_backend() == "gpu")
