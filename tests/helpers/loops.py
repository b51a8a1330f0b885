"""Loops of one shape for the small model, and requests to run in them."""

import dataclasses

from small_model import SMALL

from dsv4_jax import KVCacheManager, build_schedule
from dsv4_jax.decode import DecodeLoop, decode_steps, prefill_step
from dsv4_jax.decode.programs import OneDevice

# Every request below ends at more than 48 and at most 72 tokens: readers look at 6 blocks, one program of each kind.
ENOUGH, TIGHT = 24, 6


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is submitted, hashable."""

    prompt: tuple[int, ...]
    new: int
    options: tuple = ()

    def submit(self, loop):
        return loop.submit(self.prompt, self.new, **dict(self.options))


def ask(length, limit, start=1, **options):
    return Ask(tuple((start + 7 * i + i * i) % 64 for i in range(length)), limit - length, tuple(options.items()))


def programs_compiled(model):
    """How many programs of prompts' steps there are in this process, and of decode steps."""
    return tuple(OneDevice(model).over(step)._cache_size() for step in (prefill_step, decode_steps))


def make_loop(model, blocks=ENOUGH, slots=3, cache_dtype="fp32", max_rollback=0, prefix=None, **options):
    manager = KVCacheManager(
        SMALL,
        build_schedule(SMALL),
        max_concurrent_requests=slots,
        num_blocks_per_csa_layer=blocks,
        num_blocks_per_hca_layer=blocks,
        max_context_len=96,
        cache_dtype=cache_dtype,
        max_rollback=max_rollback,
        prefix=prefix,
    )
    return DecodeLoop(model, manager, **{"prefill_chunk": 8, "decode_chunk": 4, **options})


def run(loop, *requests, on_event=lambda event: None):
    """Submits, walks the loop -> tokens by (request, sample), and how each ended."""
    for request in requests:
        request.submit(loop)
    tokens, ends = {}, {}
    for event in loop:
        key = event.request, event.sample
        assert key not in ends, f"{key} had ended"
        tokens.setdefault(key, []).extend(event.tokens)
        if event.finished:
            ends[key] = event.finished
        loop.manager.check()
        on_event(event)
    assert_idle(loop)
    return tokens, ends


def assert_idle(loop):
    manager = loop.manager
    manager.check()
    assert manager.active_slots == []
    for kind in ("csa", "hca"):
        assert manager.num_free_blocks(kind) == manager.cache.paged[kind].num_blocks
