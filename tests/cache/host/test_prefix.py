"""Blocks kept by content: whose they are, what is found, and what goes first when blocks run short."""

import jax
import numpy as np
import pytest
from small_model import SMALL

from dsv4_jax import DSV4Config, KVCacheManager, build_schedule
from dsv4_jax.cache.host.prefix import PrefixIndex, PrefixPolicy, recomputation_reach
from dsv4_jax.cache.schema import build_schema

BLOCK = 12

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


def make(policy="full", blocks=8, slots=2, **options):
    prefix = PrefixPolicy(policy, period=2 * BLOCK, **options)
    return KVCacheManager(
        SMALL,
        build_schedule(SMALL),
        max_concurrent_requests=slots,
        num_blocks_per_csa_layer=blocks,
        num_blocks_per_hca_layer=blocks,
        max_context_len=96,
        prefix=prefix,
        debug_nan=True,
    )


def text(seed, n):
    return np.random.default_rng(seed).integers(0, 64, n)


def serve(manager, ids, salt=b"", keep=True):
    """A request that is fed its prompt block by block, without a model -> what its admission said."""
    admitted = manager.admit_prompt(ids, salt=salt)
    for start in range(admitted.start, len(ids), BLOCK):
        n = min(BLOCK, len(ids) - start)
        plan = manager.plan_step([admitted.slot] * n, np.arange(start, start + n), num_segments=1, width=BLOCK)
        manager.cache = step(manager.cache, plan)
        if keep:
            manager.keep_prefix(admitted.slot, ids[: start + n], salt=salt)
    manager.check()
    return admitted


def found(manager, ids, salt=b""):
    """Tokens found for a prompt, without leaving anything behind."""
    admitted = manager.admit_prompt(ids, salt=salt)
    manager.check()
    manager.release_request(admitted.slot)
    return admitted.hit_tokens


def test_kept_blocks_outlive_their_request_and_count_as_free():
    manager, ids = make(), text(0, 30)
    slot = serve(manager, ids).slot
    owned = manager.blocks(slot)["csa"]
    assert manager.num_free_blocks("csa") == 5
    manager.release_request(slot)
    manager.check()
    assert manager.num_free_blocks("csa") == 8
    again = manager.admit_prompt(ids)
    assert again[1:] == (24, 24, 0)
    assert manager.blocks(again.slot)["csa"] == owned[:2]
    assert manager.num_free_blocks("csa") == 6
    manager.check()


def test_another_beginning_salt_or_model_is_another_text():
    manager, ids = make(), text(0, 30)
    serve(manager, ids, salt=b"a")
    assert found(manager, ids, salt=b"a") == 24
    assert found(manager, ids) == found(manager, ids, salt=b"b") == 0
    other = ids.copy()
    other[0] += 1
    assert found(manager, other, salt=b"a") == 0
    other = ids.copy()
    other[23] += 1
    assert found(manager, other, salt=b"a") == 12
    index = [PrefixIndex(PrefixPolicy("full", period=BLOCK), name, BLOCK, 0) for name in ("one", "two")]
    assert index[0].keys(ids, b"") != index[1].keys(ids, b"")
    assert len(set(index[0].keys(np.zeros(36, np.int32), b""))) == 3


def test_a_block_is_kept_under_one_salt():
    """Shared blocks of one text are not a second text's as well; where the text was computed anew, they are."""
    manager, ids = make(), text(0, 25)
    slot = serve(manager, ids, salt=b"a").slot
    assert manager.keep_prefix(slot, ids, salt=b"b") == 0
    assert manager.keep_prefix(slot, ids[:12], salt=b"a") == 12
    child = manager.fork(slot)
    assert manager.keep_prefix(child, ids, salt=b"b") == 0
    assert manager.keep_prefix(child, ids, salt=b"a") == 24
    manager.release_request(slot)
    manager.release_request(child)
    manager.check()
    assert found(manager, ids, salt=b"b") == 0
    manager.release_request(serve(manager, ids, salt=b"b").slot)
    assert found(manager, ids, salt=b"a") == found(manager, ids, salt=b"b") == 24


def test_a_token_is_left_to_compute():
    """The logits after a prompt are not kept, so its last token is fed even if all its blocks are found."""
    manager, ids = make(), text(0, 24)
    manager.release_request(serve(manager, ids).slot)
    assert found(manager, ids) == 12
    assert found(manager, np.append(ids, 1)) == 24


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    manager = make(blocks=6, slots=3)
    old, used = text(1, 25), text(2, 25)
    for ids in (old, used):
        manager.release_request(serve(manager, ids).slot)
    assert found(manager, old) == found(manager, used) == 24  # `used` is the newest now
    manager.release_request(serve(manager, text(3, 36), keep=False).slot)  # two blocks are free, a third is needed
    assert (found(manager, used), found(manager, old)) == (24, 12)
    manager.release_request(serve(manager, text(4, 37), keep=False).slot)
    assert (found(manager, used), found(manager, old)) == (24, 12)  # `old` lost its end only


def test_blocks_in_use_are_not_evicted_and_nothing_is_when_that_would_not_do():
    manager = make(blocks=5)
    manager.release_request(serve(manager, text(1, 24)).slot)
    running = serve(manager, text(2, 24)).slot
    assert manager.num_free_blocks("csa") == 3
    other = manager.admit_request()
    with pytest.raises(RuntimeError, match="OOM: 4 more CSA blocks are needed, 1 are free"):
        manager.plan_step([other] * 48, np.arange(48))
    manager.release_request(other)
    assert found(manager, text(1, 25)) == 24
    assert manager.length(running) == 24


def test_a_beginning_computed_twice_is_evicted_though_its_end_is_in_use():
    """Of two requests with one text, one kept the beginning and the other what follows; the first has ended."""
    manager, ids = make(blocks=4, slots=3), text(1, 24)
    first, second = (serve(manager, ids, keep=False).slot for _ in range(2))
    manager.keep_prefix(first, ids[:12])
    manager.keep_prefix(second, ids)
    beginning = manager.blocks(first)["csa"][0]
    manager.release_request(first)
    assert manager.num_free_blocks("csa") == 2
    other = serve(manager, text(2, 24), keep=False).slot
    assert beginning in manager.blocks(other)["csa"]
    assert found(manager, [*ids, 1]) == 0
    manager.release_request(second)
    manager.release_request(other)
    manager.check()
    assert manager.num_free_blocks("csa") == 4


def test_kept_blocks_wait_for_planned_steps():
    """A planned step may still read a block that only the index owns: it is not given out before."""
    manager = make(blocks=2)
    slot = serve(manager, text(1, 12)).slot
    plan = manager.plan_step([slot] * 2, [12, 13])
    manager.release_request(slot)
    other = manager.admit_request()
    assert manager.num_free_blocks("csa") == 1
    with pytest.raises(RuntimeError, match="OOM: 2 more CSA blocks are needed, 1 are free"):
        manager.plan_step([other] * 24, np.arange(24))
    manager.cache = step(manager.cache, plan)
    assert manager.num_free_blocks("csa") == 2
    manager.plan_step([other] * 24, np.arange(24))


def test_state_is_kept_where_the_policy_says():
    ids = text(0, 61)
    for policy, hits in [("full", {60: 60, 59: 48}), ("periodic", {60: 60, 59: 48, 47: 36}), ("zero", {60: 60, 35: 0})]:
        manager = make(policy)
        manager.release_request(serve(manager, ids).slot)
        assert {n: found(manager, ids[: n + 1]) for n in hits} == hits
        admitted = manager.admit_prompt(ids)
        assert admitted.start == {"full": 60, "periodic": 48, "zero": 36}[policy]
        assert admitted.recomputed_tokens == 60 - admitted.start
        for plan in (
            manager.acquire(0, [admitted.slot], [admitted.start]).plan,
            manager.plan_step([admitted.slot], [admitted.start]),
        ):
            kept = None if plan.kept_blocks is None else plan.kept_blocks.tolist()
            expected = [5 if slot == admitted.slot else 0 for slot in range(2)]
            assert kept == (expected if policy == "zero" else None)
        assert (manager._books.prefix.state_bytes == 0) == (policy == "zero")


def test_kept_late_state_is_there_only_within_the_slack():
    """Kept at the end of a request, blocks lack the state at their ends that ring and tails no longer have."""
    ids = text(0, 30)
    manager = make()
    slot = serve(manager, ids, keep=False).slot
    assert manager.keep_prefix(slot, ids) == 24
    assert found(manager, ids) == 0


def test_states_have_a_limit():
    one = make()
    serve(one, text(0, 13))
    size = one._books.prefix.state_bytes
    manager = make(max_state_bytes=2 * size, blocks=16, slots=1)
    for seed in range(3):
        manager.release_request(serve(manager, text(seed, 13)).slot)
    assert manager._books.prefix.state_bytes == 2 * size
    assert [found(manager, text(seed, 13)) for seed in range(3)] == [0, 12, 12]


def test_reach_is_a_window_a_layer():
    flash = DSV4Config.flash()
    assert recomputation_reach([build_schema(flash, spec) for spec in flash.schedule]) == 43 * 127


def test_the_index_stays_small():
    """Touching a text again and again does not make the books grow."""
    manager, ids = make(), text(0, 30)
    manager.release_request(serve(manager, ids).slot)
    for _ in range(300):
        assert found(manager, ids) == 24
    assert len(manager._books.prefix._by_age) < 100


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (PrefixPolicy("most"), "prefix policy 'most' is not known: expected one of full, periodic, zero"),
        (PrefixPolicy("full", max_state_bytes=-1), "max_state_bytes is -1: expected an integer, 0 or more"),
        (PrefixPolicy("periodic", period=18), "period is 18: expected a multiple of the block's 12 tokens"),
    ],
)
def test_bad_policies(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.check(BLOCK)


def test_bad_prompts_change_nothing():
    manager = make()
    for ids, message in [
        ([], "the prompt has 0 tokens: expected 1 to 96"),
        (np.zeros(97, int), "the prompt has 97 tokens"),
        ([0.5], "token_ids are float64"),
        ([[1]], "expected integers"),
        ([1 << 32], "token_ids reach from 4294967296 to 4294967296: expected 0 to 2147483647"),
    ]:
        with pytest.raises(ValueError, match=message):
            manager.admit_prompt(ids)
    with pytest.raises(ValueError, match="salt is 'a': expected bytes"):
        manager.admit_prompt([1], salt="a")
    assert manager.active_slots == []
    manager.admit_prompt([1])
    manager.admit_prompt([1])
    with pytest.raises(RuntimeError, match="concurrent"):
        manager.admit_prompt([1])
    manager.check()


def test_the_last_states_of_texts_outlive_those_in_the_middle():
    """Two texts of ten blocks in turn, room for eight states: both go on from their last, and where texts part."""
    state = {"x": np.zeros(1, np.uint8)}
    index = PrefixIndex(PrefixPolicy("full", max_state_bytes=8), "", 4, 0)
    texts = [np.r_[np.full(8, 9), np.arange(32) + 100 * t].astype(np.int32) for t in range(2)]
    for i, text in enumerate(texts):
        keys = index.keys(text, b"")
        index.add(keys, {"csa": [10 * i + j for j in range(10)]})
        for n, key in enumerate(keys, 1):
            if index.lacks_state(key, 4 * n):
                index.keep_state(key, state)
        index.check()
    assert index.state_bytes == 8
    assert [index.match(index.keys(text, b""), ["csa"]).start for text in texts] == [40, 40]
    common = np.r_[texts[0][:8], [1]].astype(np.int32)
    assert index.match(index.keys(common, b""), ["csa"]).start == 8
