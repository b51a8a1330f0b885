"""What the build promises: libraries where there is a compiler, loadable by every supported JAX."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import tomllib

import pytest

import dsv4_jax
from dsv4_jax.ops import dispatch

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_the_libraries_are_built_for_the_oldest_supported_jax():
    """The build takes the headers of the jaxlib that the package's lower bound on JAX names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    [oldest] = [r.removeprefix("jax>=") for r in project["project"]["dependencies"] if r.startswith("jax>=")]
    assert f"jaxlib=={oldest}.*" in project["build-system"]["requires"]


def test_an_installation_on_a_machine_with_a_compiler_is_native():
    try:
        importlib.metadata.distribution("dsv4_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dsv4_jax is not installed here")
    if not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler")
    assert "cpu" in dispatch.available()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(("asked", "words"), [("AUTO", "No NVIDIA GPU here"), ("OFF", "DSV4_CUDA is OFF")])
def test_cuda_is_built_where_there_is_a_gpu_or_where_it_is_asked_for(tmp_path, asked, words):
    if any(pathlib.Path(p).exists() for p in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")):
        pytest.skip("there is a GPU")
    command = ["cmake", "-S", REPOSITORY / "ffi", "-B", tmp_path, f"-DDSV4_CUDA={asked}"]
    result = subprocess.run(
        [*command, f"-DDSV4_XLA_INCLUDE_DIR={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert words in result.stdout or "No C++ compiler" in result.stderr
    assert "CUDA compiler" not in result.stdout


def test_the_version_is_said_once():
    """In dsv4_jax/__init__.py, which the build reads."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "dsv4_jax/__init__.py"
    try:
        installed = importlib.metadata.version("dsv4_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dsv4_jax is not installed here")
    assert installed == dsv4_jax.__version__
