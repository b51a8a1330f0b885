"""Which form of an operation is traced, where several could run."""

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


def test_the_platforms_are_those_of_jax():
    assert "cpu" in dispatch.platforms()
    assert ("cuda" in dispatch.platforms()) == (jax.default_backend() == "gpu")
