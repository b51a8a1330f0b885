"""The model that the loop's tests run, and what a request gets from a loop of its own."""

import pytest
from flax import nnx
from loops import make_loop
from small_model import SMALL

from dsv4_jax.model.transformer import DSV4Model


@pytest.fixture(scope="session")
def model():
    model = DSV4Model(SMALL, rngs=nnx.Rngs(2))
    model.head.weight[...] = model.head.weight[...] * 4
    return model


@pytest.fixture(scope="session")
def alone(model):
    """Request -> the tokens it gets with the loop to itself."""
    loop, known = make_loop(model), {}

    def tokens(request):
        if request not in known:
            number = request.submit(loop)
            known[request] = [t for event in loop for t in event.tokens if event.request == number]
        return known[request]

    return tokens
