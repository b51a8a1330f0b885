"""The forms of an operation that a test runs on."""

import contextlib

import jax
import pytest

from dsv4_jax.ops import dispatch


@contextlib.contextmanager
def form_of_operation(name, platform):
    """The form's name, with a device of its platform as the default; skips what was not built."""
    if name in ("cpu", "cuda") and name not in dispatch.available():
        pytest.skip(f"no native library for {name}")
    with jax.default_device(jax.devices(platform)[0]):
        yield name
