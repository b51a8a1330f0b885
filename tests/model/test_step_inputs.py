"""A step of the model takes what fits it, or says in a sentence what does not."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import SMALL

from dsv4_jax import KVCacheManager, build_schedule
from dsv4_jax.decode import DecodeLoop
from dsv4_jax.model.transformer import DSV4Model


@pytest.fixture(scope="module")
def model():
    return DSV4Model(SMALL, rngs=nnx.Rngs(2))


def make(**fields):
    config = SMALL.replace(**fields)
    return KVCacheManager(
        config,
        build_schedule(config),
        max_concurrent_requests=1,
        num_blocks_per_csa_layer=2,
        num_blocks_per_hca_layer=2,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2, "compress_ratios": (0, 4)}, "the cache has 2 layers, the model 3"),
        ({"num_hidden_layers": 4, "compress_ratios": (0, 4, 6, 0)}, "the cache has 4 layers, the model 3"),
        ({"compress_ratios": (0, 6, 4)}, "layer 1 of the cache has kind = 'hca', that of the model 'csa'"),
        ({"csa_ratio": 3, "compress_ratios": (0, 3, 6)}, "layer 1 of the cache has compress_ratio = 3"),
        ({"sliding_window": 3}, "layer 0 of the cache has swa_window_size = 3, that of the model 8"),
        ({"head_dim": 64}, "head_dim = 64"),
    ],
)
def test_a_cache_of_another_configuration(model, fields, message):
    """Another window, unlike most of these, would give an answer, and a wrong one."""
    manager = make(**fields)
    with pytest.raises(ValueError, match=message):
        DecodeLoop(model, manager)
    plan = manager.plan_step([manager.admit_request()], [0])
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(1, jnp.int32), manager.cache, plan)


def test_token_ids_and_plan(model):
    manager = make()
    plan = manager.plan_step([manager.admit_request()] * 3, [0, 1, 2])
    for ids, message in [
        (np.zeros(2, np.int32), r"token_ids is int32\(2,\): expected integers \(3,\), one for each token of the plan"),
        (np.zeros((3, 1), np.int32), r"token_ids is int32\(3, 1\)"),
        (np.zeros(3, np.float32), r"token_ids is float32\(3,\)"),
        ([0, 0, 0], r"token_ids is a list: expected an array \(3,\) of integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, manager.cache, plan)
    with pytest.raises(ValueError, match="cache is a KVCacheManager: expected the KVCache"):
        model(np.zeros(3, np.int32), manager, plan)
    with pytest.raises(ValueError, match="plan is a NoneType: expected the StepPlan"):
        model(np.zeros(3, np.int32), manager.cache, None)
