"""What a cache costs, against real caches, to the byte."""

import subprocess
import sys

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax import DSV4Config, KVCacheManager, PrefixPolicy
from dsv4_jax.cache.cost import cache_cost
from dsv4_jax.cache.formats import INDEXER_FORMATS, RECORD_FORMATS
from dsv4_jax.cache.schema import compute_block_budget

FLASH = DSV4Config.flash()

configs = st.builds(
    lambda kinds, ratios, head_dim, window: FLASH.replace(
        num_hidden_layers=len(kinds),
        compress_ratios=tuple((0, *ratios)[kind] for kind in kinds),
        csa_ratio=ratios[0],
        hca_ratio=ratios[1],
        head_dim=head_dim,
        sliding_window=window,
        num_hash_layers=0,
        max_position_embeddings=4096,
    ),
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6),
    st.sampled_from([(4, 128), (4, 6)]),
    st.sampled_from([128, 512]),
    st.sampled_from([16, 128]),
)
options = st.fixed_dictionaries(
    {
        "cache_dtype": st.sampled_from(sorted(RECORD_FORMATS)),
        "indexer_dtype": st.sampled_from(INDEXER_FORMATS),
        "max_rollback": st.sampled_from([0, 3]),
        "hca_tail": st.sampled_from(["full", "running"]),
    }
)
requests = st.integers(1, 4)


def _held(manager: KVCacheManager) -> int:
    """Bytes of the arrays themselves."""
    return sum(array.nbytes for array in jax.tree.leaves(manager.cache))


@settings(max_examples=16)
@given(configs, options, requests, st.integers(1, 1500))
def test_a_size_is_that_of_the_real_cache_to_the_byte(config, options, requests, context):
    cost = cache_cost(config, config.schedule, **options)
    size = cost.size(requests, context)
    budget = compute_block_budget(config, config.schedule, context, requests)
    assert {**dict.fromkeys(budget, 0), **size.num_blocks} == budget
    manager = KVCacheManager(
        config, config.schedule, max_concurrent_requests=requests, max_context_len=context,
        num_blocks_per_csa_layer=budget["csa"], num_blocks_per_hca_layer=budget["hca"], **options,
    )  # fmt: skip
    assert size.total_bytes == _held(manager) == manager.memory_bytes()


@given(configs, options, requests, st.integers(0, 1 << 24))
def test_the_largest_context_and_concurrency_fit_and_the_next_does_not(config, options, requests, memory):
    cost = cache_cost(config, config.schedule, **options)
    context = cost.largest_context(memory, requests, limit := config.max_position_embeddings)
    assert not context or cost.size(requests, context).total_bytes <= memory
    assert context == limit or cost.size(requests, context + 1).total_bytes > memory
    most = cost.largest_concurrency(memory, 700)
    assert not most or cost.size(most, 700).total_bytes <= memory
    assert cost.size(most + 1, 700).total_bytes > memory


@settings(max_examples=10)
@given(configs, options, requests, st.integers(1, 1500), st.floats(0, 1.2))
def test_a_manager_made_from_memory_fills_it(config, options, requests, context, share):
    cost = cache_cost(config, config.schedule, **options)
    full = cost.size(requests, context)
    smallest = cost.total_bytes(requests, context, cost.blocks_for(context))
    memory = smallest + round(share * (full.total_bytes - smallest))
    manager = KVCacheManager.from_memory(
        config, memory, max_concurrent_requests=requests, max_context_len=context, **options
    )
    assert _held(manager) <= memory
    have = {kind: pool.num_blocks for kind, pool in manager.cache.paged.items()}
    assert all(have[kind] >= n for kind, n in cost.blocks_for(context).items())
    if memory >= full.total_bytes:
        assert have == full.num_blocks
    else:  # one block more of every kind that could have more would not fit
        wanting = [k for k in cost.kinds if k.block and have[k.kind] < full.num_blocks[k.kind]]
        fewest = min(have[k.kind] for k in wanting)
        assert _held(manager) + sum(k.block for k in wanting if have[k.kind] == fewest) > memory
    with pytest.raises(ValueError, match=r"too few .* would fit|too few .* the smallest cache takes [\d,]+"):
        KVCacheManager.from_memory(
            config, smallest - 1, max_concurrent_requests=requests, max_context_len=context, **options
        )


def test_without_a_context_every_request_gets_the_longest():
    config = FLASH.replace(num_hidden_layers=3, compress_ratios=(0, 4, 128))
    cost = cache_cost(config, config.schedule)
    memory = cost.size(2, 1000).total_bytes
    manager = KVCacheManager.from_memory(
        config, memory, max_concurrent_requests=2, prefix=PrefixPolicy("full"), fingerprint="x"
    )
    assert manager.prefix_policy == PrefixPolicy("full")
    # 1000 tokens touch 8 blocks of CSA and 7 of HCA; 1023 do so too.
    assert manager.max_context_len == 1023
    assert {kind: pool.num_blocks for kind, pool in manager.cache.paged.items()} == {"csa": 16, "hca": 14}
    with pytest.raises(ValueError, match="too few for a cache of 2 concurrent requests"):
        KVCacheManager.from_memory(config, 1000, max_concurrent_requests=2)
    for memory in ("80GiB", -5, float("inf"), None):
        with pytest.raises(ValueError, match=f"memory_bytes is {memory!r}: expected an integer, 0 or more"):
            KVCacheManager.from_memory(config, memory, max_concurrent_requests=2)


def test_too_little_memory_says_what_is_missing_and_what_fits():
    cost = cache_cost(FLASH, FLASH.schedule)
    memory = cost.size(8, 2048).total_bytes
    smallest = cost.total_bytes(8, 32768, cost.blocks_for(32768))
    with pytest.raises(ValueError, match="would fit") as refusal:
        cost.fill(memory, 8, 32768)
    context, most = cost.largest_context(memory, 8, 32768), cost.largest_concurrency(memory, 32768)
    assert f"{smallest - memory:,} too few" in str(refusal.value)
    assert context > 2000
    assert most == 1
    assert f"8 requests of {context:,} tokens or 1 request of 32,768 tokens would fit" in str(refusal.value)


@pytest.mark.parametrize(("requests", "context"), [(0, 100), (1, 0), (-1, 100)])
def test_nothing_is_no_size(requests, context):
    with pytest.raises(ValueError, match="expected an integer from 1 to"):
        cache_cost(FLASH, FLASH.schedule).size(requests, context)


def test_costs_touch_no_device():
    """A plan may be made beside a server that holds all of the GPU's memory."""
    code = (
        "from dsv4_jax import DSV4Config; from dsv4_jax.cache.cost import cache_cost;"
        "print(cache_cost(DSV4Config.pro(), DSV4Config.pro().schedule).size(16, 131072).total_bytes)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


@pytest.mark.parametrize("options", [{"max_concurrent_requests": 10**20}, {"max_context_len": 2**31}])
def test_numbers_that_no_cache_can_have(options):
    with pytest.raises(ValueError, match="expected an integer from 1 to 2147483647"):
        KVCacheManager.from_memory(FLASH, 10**30, **{"max_concurrent_requests": 1, **options})
