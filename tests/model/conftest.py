"""What the tests of the model share."""

from pathlib import Path

import pytest

import dsv4_jax.model

TINY = Path(dsv4_jax.model.__file__).parents[1] / "data" / "tiny_dsv4"


@pytest.fixture(scope="session")
def tiny():
    """The folder of the packaged checkpoint."""
    return TINY
