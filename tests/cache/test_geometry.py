"""A cache for a model of one's own, from its geometry alone."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.cache.geometry import AttentionType, CacheGeometry
from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.manager import KVCacheManager
from dsv4_jax.cache.schema import build_schema
from dsv4_jax.model.config import DSV4Config


@pytest.mark.parametrize("config", [DSV4Config.flash(), DSV4Config.pro()], ids=["flash", "pro"])
def test_a_released_model_has_the_schemas_of_its_geometry(config):
    of_config = [build_schema(config, spec) for spec in config.schedule]
    assert [build_schema(config.geometry, layer) for layer in config.geometry.schedule] == of_config


def test_the_blocks_follow_from_the_requests_and_their_length():
    geometry = CacheGeometry(layers=("swa", "csa", "hca"), head_dim=32, rope_dim=8, window=8, index_head_dim=16)
    manager = KVCacheManager.create(geometry, max_concurrent_requests=3, max_context_len=300, cache_dtype="fp32")
    assert manager.num_free_blocks("csa") == 3 * 3  # 75 entries, 32 a block
    assert manager.num_free_blocks("hca") == 3 * 2
    slots = [manager.admit_request() for _ in range(3)]
    plan = manager.plan_step(slots, [0, 0, 0])

    @jax.jit
    def write_and_read(cache, plan):
        return LayerCacheHandle(cache, plan, layer_idx=0).write_swa(jnp.ones((3, 32))).read_swa_view().kv

    assert write_and_read(manager.cache, plan)[:, 0, 0].sum() == 3.0


def test_geometry_of_other_ratios():
    geometry = CacheGeometry(layers=["csa", "hca"], csa_ratio=2, hca_ratio=6)
    assert geometry.layers == (AttentionType.CSA, AttentionType.HCA)
    assert geometry.block_size == 6
    assert [layer.attn for layer in geometry.schedule] == ["csa", "hca"]
    assert hash(geometry) == hash(CacheGeometry(layers=("csa", "hca"), csa_ratio=2, hca_ratio=6))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layers": ()}, "layers is ()"),
        ({"layers": "csa"}, "layers is 'csa'"),
        ({"layers": ("csa", "mla")}, "layer 1 is 'mla': expected one of swa, csa, hca"),
        ({"layers": ("swa",), "window": 0}, "window"),
        ({"layers": ("swa",), "rope_dim": 1024}, "rope_dim"),
        ({"layers": ("swa",), "csa_ratio": 1.5}, "csa_ratio"),
    ],
)
def test_what_is_no_geometry(fields, sentence):
    with pytest.raises(ValueError, match="^" + sentence.replace("(", r"\(").replace(")", r"\)")):
        CacheGeometry(**fields)
