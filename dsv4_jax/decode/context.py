"""How much context the readers of a call look at."""

FIRST_GROWTH = 1024
"""Tokens that readers look at before growth counts: up to there a request's limit decides."""


def round_up_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold num_tokens, rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    blocks = max(-(-num_tokens // block_size), 1)
    power = 1 << (blocks - 1).bit_length()
    return power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power


def blocks_to_read(num_tokens: int, limit: int, block_size: int) -> int:
    """Blocks to read for a request of num_tokens that ends at `limit` tokens at the latest.

    Every number of blocks is a program to compile, so few are used: that of the limit where it is near, and a coarse
    growth (1024, 4096, 16384, … tokens) towards a limit that is far.
    """
    growth = FIRST_GROWTH
    while growth < num_tokens:
        growth *= 4
    return min(-(-growth // block_size), round_up_blocks(limit, block_size))
