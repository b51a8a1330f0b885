"""A small cache that has every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DSV4Config, KVCacheManager, build_schedule
from dsv4_jax.ops.write.compress import CompressorWeights

CONFIG = DSV4Config.flash().replace(num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128))


@pytest.fixture
def config():
    return CONFIG


@pytest.fixture
def make():
    """make(...) -> KVCacheManager of the small model; blocks for two requests of 256 tokens by default."""

    def make(**options):
        options = {
            "config": CONFIG,
            "schedule": build_schedule(CONFIG),
            "max_concurrent_requests": 2,
            "num_blocks_per_csa_layer": 4,
            "num_blocks_per_hca_layer": 4,
            "max_context_len": 256,
            **options,
        }
        return KVCacheManager(**options)

    return make


@pytest.fixture
def weights():
    """weights(ratio, dim, lanes) -> CompressorWeights with random content."""

    def weights(ratio, dim, lanes):
        rng = np.random.default_rng(ratio * dim)
        return CompressorWeights(
            ape=jnp.asarray(rng.normal(size=(ratio, lanes * dim)), jnp.float32),
            norm=jnp.asarray(rng.uniform(0.5, 1.5, dim), jnp.float32),
            inv_freq=jnp.asarray(1e4 ** -(np.arange(32) / 32), jnp.float32),
        )

    return weights


@pytest.fixture
def same():
    """same(a, b): two pytrees hold the same bits."""

    def same(a, b):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                return False
        return jax.tree.structure(a) == jax.tree.structure(b)

    return same
