"""What the tests of the model share."""

import shutil
from pathlib import Path

import pytest

import dsv4_jax.model
from dsv4_jax.files.safetensors_file import open_checkpoint

TINY = Path(dsv4_jax.model.__file__).parents[1] / "data" / "tiny_dsv4"


@pytest.fixture(scope="session")
def sharp(data):
    """The folder of the random checkpoint."""
    return data / "sharp_dsv4"


@pytest.fixture
def checkpoint(sharp):
    """The folder that `stored` and `rewrite` are about."""
    return sharp


@pytest.fixture
def stored(checkpoint):
    """The tensors of `checkpoint`, by the names its files give them."""
    return dict(open_checkpoint(checkpoint))


@pytest.fixture
def rewrite(checkpoint, tmp_path, to_bytes):
    """Writes a checkpoint of other tensors with the config.json of `checkpoint`; returns its folder."""

    def write(tensors):
        shutil.copy(checkpoint / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(to_bytes[0](tensors))
        return tmp_path

    return write


@pytest.fixture(scope="session")
def tiny():
    """The folder of the packaged checkpoint."""
    return TINY
