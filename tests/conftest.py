"""Settings for every test: strict dtypes and ranks, fixed seeds, GPU tests only where there is a GPU."""

from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from safetensors_bytes import file_bytes, safetensors_bytes

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="JAX has no GPU here"))


@pytest.fixture
def rng():
    return np.random.default_rng(2606)


@pytest.fixture(scope="session")
def data():
    """The folder of the tests' data."""
    return Path(__file__).parent / "data"


@pytest.fixture
def to_bytes():
    """`safetensors_bytes` and `file_bytes`."""
    return safetensors_bytes, file_bytes
