"""Geometry and block budget."""

import dataclasses

import jax
import pytest

from dsv4_jax import DSV4Config, build_schedule
from dsv4_jax.cache.cost import cache_cost
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.schema import BLOCK_SIZE_ORIGINAL_TOKENS, build_schema, compute_block_budget
from dsv4_jax.cache.state_cache import StateCachePool

FLASH = DSV4Config.flash()
SCHEDULE = build_schedule(FLASH)


@pytest.mark.parametrize(
    ("layer", "entries", "keys", "tail", "rows"),
    [(0, 0, 0, 0, 0), (2, 32, 32, 3, 8), (3, 1, 0, 127, 128)],
    ids=["swa", "csa", "hca"],
)
def test_geometry(layer, entries, keys, tail, rows):
    schema = build_schema(FLASH, SCHEDULE[layer])
    assert schema.entries_per_block == entries
    assert schema.indexer_entries_per_block == keys
    assert schema.tail_buffer_size == tail
    assert schema.overlap_tail_rows == rows
    assert schema.swa_window_size == 128
    assert schema.entry_head_dim == FLASH.head_dim == 512
    assert schema.nope_dim == 448


def test_block_covers_the_least_common_multiple():
    assert BLOCK_SIZE_ORIGINAL_TOKENS == 128
    assert {build_schema(FLASH, spec).block_size for spec in SCHEDULE} == {128}


SMALL = FLASH.replace(
    num_hidden_layers=3,
    compress_ratios=(0, 4, 6),
    csa_ratio=4,
    hca_ratio=6,
    sliding_window=8,
    head_dim=48,
    rope_dim=16,
    index_head_dim=32,
)


def test_small_geometry():
    schemas = [build_schema(SMALL, spec, max_rollback=2) for spec in build_schedule(SMALL)]
    assert [s.block_size for s in schemas] == [12] * 3
    assert [s.entries_per_block for s in schemas] == [0, 3, 2]
    assert [s.tail_rows for s in schemas] == [0, 5, 7]
    assert [s.ring_rows for s in schemas] == [10] * 3
    assert [s.blocks_for(13) for s in schemas] == [0, 1, 1]
    assert [s.blocks_for(16) for s in schemas] == [0, 2, 1]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"cache_dtype": "fp8_ue8m0"}, "fp8_ue8m0 needs a multiple of 64 values without position, got 32"),
        ({"index_head_dim": 48}, {"indexer_dtype": "nvfp4"}, "'nvfp4' stores keys .* not index_head_dim = 48"),
        ({"rope_dim": 8, "index_head_dim": 16}, {"indexer_dtype": "mxfp4"}, "'mxfp4' stores keys .* at least 32, not"),
    ],
)
def test_dimensions_that_a_form_cannot_store(changes, options, message):
    config = SMALL.replace(**changes)
    with pytest.raises(ValueError, match=message):
        build_schema(config, build_schedule(config)[1], **options)


def test_a_spec_may_stand_alone():
    """What an attention is, its spec says; the configuration has the ratios."""
    for spec in SCHEDULE[:4]:
        moved = dataclasses.replace(spec, layer_idx=(spec.layer_idx + 1) % 4)
        assert build_schema(FLASH, moved) == build_schema(FLASH, spec)


@pytest.mark.parametrize("config", [DSV4Config.flash(), DSV4Config.pro()], ids=["flash", "pro"])
def test_budget_of_a_million_tokens(config):
    assert compute_block_budget(config, build_schedule(config), 1_000_000, 16) == {"csa": 125_008, "hca": 124_992}


@pytest.mark.parametrize(
    ("tokens", "csa", "hca"), [(0, 0, 0), (3, 0, 0), (4, 1, 0), (127, 1, 0), (128, 1, 1), (131, 1, 1), (132, 2, 1)]
)
def test_a_block_is_needed_with_its_first_entry(tokens, csa, hca):
    assert compute_block_budget(FLASH, SCHEDULE, tokens, 1) == {"csa": csa, "hca": hca}


@pytest.mark.parametrize(("tokens", "requests"), [(-1, 1), (1, 0), (128, 2.5), (128.0, 2), ("128", 1), (True, 1)])
def test_a_budget_is_of_whole_tokens_and_requests(tokens, requests):
    with pytest.raises(ValueError, match=r"max_\w+ is .*: expected an integer, [01] or more"):
        compute_block_budget(FLASH, SCHEDULE, tokens, requests)


def test_a_budget_depends_on_no_format():
    """Widths that only the exact formats store; blocks are counted all the same."""
    config = FLASH.replace(index_head_dim=96, head_dim=100)
    assert compute_block_budget(config, build_schedule(config), 1000, 2) == compute_block_budget(
        FLASH, SCHEDULE, 1000, 2
    )


def test_rollback_makes_room():
    schema = build_schema(FLASH, SCHEDULE[2], max_rollback=8)
    assert [schema.ring_rows, schema.tail_rows, schema.overlap_tail_rows] == [136, 11, 15]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "fp16"}, "cache_dtype 'fp16' is not known"),
        ({"indexer_dtype": "int4"}, "indexer_dtype 'int4' is not known"),
        ({"max_rollback": -1}, "max_rollback is -1"),
        ({"max_rollback": 1.5}, "max_rollback is 1.5: expected an integer, 0 or more"),
        ({"hca_tail": "short"}, "hca_tail 'short' is not known: expected one of full, running"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_schema(FLASH, SCHEDULE[2], **options)


def test_a_running_tail_is_small():
    full, running = (build_schema(FLASH, SCHEDULE[3], hca_tail=tail) for tail in ("full", "running"))
    sizes = [StateCachePool(schema, 1).tail for schema in (full, running)]
    assert [sum(x.nbytes for x in jax.tree.leaves(tail)) for tail in sizes] == [128 * 4096, 2 * 10240]
    assert not build_schema(FLASH, SCHEDULE[2], hca_tail="running").running_tail


def test_what_a_request_holds_besides_its_entries():
    """Rings and tails of a V4-Flash request in the engines' record: 5.1 MB at most, one token to roll back included."""
    records = {"cache_dtype": "fp8_ue8m0", "indexer_dtype": "mxfp4", "max_rollback": 1}
    fixed = {tail: cache_cost(FLASH, SCHEDULE, hca_tail=tail, **records).per_request for tail in ("full", "running")}
    schemas = tuple(build_schema(FLASH, spec, hca_tail="running", **records) for spec in SCHEDULE)
    none = {"csa": 0, "hca": 0}
    cache = jax.eval_shape(lambda: KVCache.allocate(schemas, 3, none, none))
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.state))
    assert fixed["running"] * 3 == bytes_of_state
    assert 4.9e6 < fixed["running"] < 5.1e6
    assert fixed["full"] > 15e6


def test_schema_is_hashable():
    schema = build_schema(FLASH, SCHEDULE[2])
    assert hash(schema) == hash(dataclasses.replace(schema))
