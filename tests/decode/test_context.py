"""How many blocks readers look at: enough, not many more, and few different numbers."""

from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.decode.context import FIRST_GROWTH, blocks_to_read, round_up_blocks


def test_sizes():
    assert [round_up_blocks(128 * n, 128) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [round_up_blocks(n, 128) for n in (0, 1, 128, 129, 640)] == [1, 1, 1, 2, 6]


@given(st.integers(1, 1 << 20), st.data(), st.sampled_from([12, 128]))
def test_a_request_finds_all_of_its_tokens(limit, data, block_size):
    num_tokens = data.draw(st.integers(1, limit))
    blocks = blocks_to_read(num_tokens, limit, block_size)
    assert blocks * block_size >= num_tokens
    assert blocks <= round_up_blocks(limit, block_size) <= max(1.5 * limit / block_size + 1.5, 2)
    assert (blocks - 1) * block_size < max(4 * num_tokens, FIRST_GROWTH)


def test_a_request_up_to_1024_tokens_has_one_program_and_a_million_have_six():
    assert {blocks_to_read(n, 640, 128) for n in range(1, 641)} == {6}
    assert len({blocks_to_read(n, 1 << 20, 128) for n in range(1, 1 << 20, 128)}) == 6
