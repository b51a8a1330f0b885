"""What the host does between steps touches a slot or some blocks, and never copies the cache."""

import jax
import numpy as np
import pytest

from dsv4_jax.cache.transfer import slots
from dsv4_jax.cache.transfer.state_rows import first_row, row_ranges

CSA = 1
SLACK = 1 << 16


@pytest.fixture
def cache(make):
    return make(max_concurrent_requests=8, num_blocks_per_csa_layer=64, num_blocks_per_hca_layer=512).cache


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(function, *args):
    return function.lower(*args).compile().memory_analysis()


def test_writing_a_slot_is_in_place(cache):
    values = slots.slot_shapes(cache)
    used = memory(slots._write_slot, cache.state, np.int32(3), values)
    assert used.alias_size_in_bytes == nbytes(cache.state)
    assert used.temp_size_in_bytes <= nbytes(values) + SLACK < nbytes(cache.state)


def test_writing_blocks_is_in_place(cache):
    for kind, n in (("csa", 2), ("hca", 16)):
        pool = cache.paged[kind]
        some = jax.tree.map(lambda x, n=n: jax.ShapeDtypeStruct((x.shape[0], n, *x.shape[2:]), x.dtype), pool)
        used = memory(slots._write_blocks, pool, np.zeros(n, np.int32), some, np.int32(n))
        assert used.alias_size_in_bytes == nbytes(pool)
        assert used.temp_size_in_bytes <= nbytes(some) + SLACK < nbytes(pool)


def test_reading_takes_what_it_brings(cache):
    pool = cache.paged["csa"]
    used = memory(slots._read_blocks, pool, np.zeros(2, np.int32))
    assert used.output_size_in_bytes + used.temp_size_in_bytes <= 2 * nbytes(pool) * 2 / 64 + SLACK
    arrays = {"ring": cache.state["csa"].ring.rope, "tail": cache.state["csa"].tail.ka}
    rows = {name: np.zeros(x.shape[2], np.int32) for name, x in arrays.items()}
    used = memory(slots._read_rows, arrays, np.int32(0), rows)
    assert used.output_size_in_bytes + used.temp_size_in_bytes <= 3 * nbytes(arrays) / 8 + SLACK


def test_entering_blocks_donates_the_tables(cache):
    rows = {kind: np.zeros((4, 3), np.int32) for kind in cache.block_table}
    assert memory(slots._enter, cache.block_table, rows).alias_size_in_bytes == nbytes(cache.block_table)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200])
def test_blocks_come_in_few_sizes(n):
    parts = slots._parts(range(n))
    assert [i for padded, m in parts for i in padded[:m]] == list(range(n))
    assert {len(padded) for padded, _ in parts} <= {1, 2, 4, 8, 16, 32, 64}


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0, {"ring.nope": 0, "tail.ka": 0, "tail.kb": 0, "indexer_tail.za": 0}),
        (3, {"ring.nope": 0, "tail.ka": 0, "tail.kb": 0, "indexer_tail.za": 0}),
        (4, {"ring.nope": 0, "tail.ka": 0, "tail.kb": 4, "indexer_tail.za": 0}),
        (130, {"ring.nope": 3, "tail.ka": 124, "tail.kb": 128, "indexer_tail.za": 124}),
    ],
)
def test_what_a_length_needs(cache, least, expected):
    schema = cache.schemas[CSA]
    assert {name: first_row(schema, name, least) for name in expected} == expected
    hca = cache.schemas[2]
    assert first_row(hca, "tail.ka", least) == least // 128 * 128
    assert first_row(hca, "tail.sums", least) == (least - 1 if least else 0)
    assert first_row(hca, "tail.sums", 128) == 128
    ranges = row_ranges({"csa": schema}, {"csa": cache.state["csa"]}, least, least + 1)
    assert ranges["csa.tail.kb"] == (expected["tail.kb"], least + 1)
    assert not {"csa.ring.pos", "csa.ring.head"} & set(ranges)
