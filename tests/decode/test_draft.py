"""Draft and verify: the same tokens as without, in fewer calls where the text repeats itself."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from loops import TIGHT, Ask, ask, make_loop, run

from dsv4_jax import PrefixPolicy
from dsv4_jax.decode.draft import LONGEST_NGRAM, PromptLookup

DRAFT = 3
# Loops of one kind, so that few programs are compiled; tests/decode/test_interrupts.py drafts without logits.
DRAFTING = {"max_rollback": DRAFT, "draft_tokens": DRAFT, "return_logits": True}


def slow_lookup(ids, most):
    """What followed the last occurrence of the longest n-gram at the end, the text going on with the draft itself."""
    for n in range(min(LONGEST_NGRAM, len(ids)), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                text = list(ids)
                for i in range(most):
                    text.append(text[start + n + i])
                return text[len(ids) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 5), st.integers(0, 40))
def test_lookup(ids, most, cut):
    lookup = PromptLookup(ids[:cut])
    lookup.extend(ids[cut:])
    assert lookup.propose(most) == slow_lookup(ids, most)


def test_drafts_change_no_token(model, alone):
    """Greedy and drawn, past edges of windows and blocks, where blocks run out and requests come back."""
    requests = [ask(20, 60), ask(3, 66, start=4), ask(9, 58, start=5, temperature=0.3, seed=3), ask(40, 72, start=6)]
    loop = make_loop(model, TIGHT, **DRAFTING)
    tokens, _ = run(loop, *requests)
    assert tokens == {(i, 0): alone(request) for i, request in enumerate(requests)}
    assert loop.stats.preemptions > 0
    assert 0 < loop.stats.accepted_tokens < loop.stats.drafted_tokens
    assert loop.stats.acceptance == loop.stats.accepted_tokens / loop.stats.drafted_tokens


def test_a_text_that_repeats_itself_takes_fewer_steps(model):
    """A sample takes as many steps as tokens came from the model, not from drafts."""
    request = ask(3, 66, start=4)
    loop = make_loop(model, TIGHT, **DRAFTING)
    request.submit(loop)
    events = list(loop)
    assert loop.stats.calls == len(events) == request.new - loop.stats.accepted_tokens
    assert loop.stats.accepted_tokens > 0
    # The logits belong to the tokens.
    assert [int(row.argmax()) for event in events for row in event.logits] == [t for e in events for t in e.tokens]
    assert all(np.isfinite(event.logits).all() for event in events)


TEXTS = [ask(45, 72, start=start).prompt for start in (1, 5, 9)]


def draw(rng):
    """A request that begins like others, or ends in the middle of their blocks."""
    own = rng.integers(0, 64, rng.integers(0, 12)).tolist()
    prompt = (*TEXTS[rng.integers(3)][: rng.choice([1, 11, 12, 13, 24, 36, 37])], *own)
    options = {
        "temperature": rng.choice([0.0, 0.0, 0.3, 1.0]),
        "seed": int(rng.integers(3)),
        "num_samples": int(rng.choice([1, 1, 1, 2, 3])),
        "stop_tokens": tuple(rng.integers(0, 64, rng.integers(0, 3)).tolist()),
        "salt": rng.choice([b"", b"", b"x"]),
    }
    return Ask(prompt, int(rng.choice([50, 60, 72])) - len(prompt), tuple(options.items()))


def test_drafts_samples_prefixes_aborts_and_preemptions_together(model, alone):
    """Random traffic: whatever meets whatever in a pool for one, every sample ends, with the tokens it gets alone."""
    rng = np.random.default_rng(4)
    loop = make_loop(model, TIGHT, **DRAFTING, prefix=PrefixPolicy("full"))
    waiting, running, tokens, ends, aborted = [draw(rng) for _ in range(14)], {}, {}, {}, set()

    def take(events):
        loop.manager.check()
        for event in events:
            key = event.request, event.sample
            assert key not in ends, f"{key} had ended"
            tokens.setdefault(key, []).extend(event.tokens)
            if event.finished:
                ends[key] = event.finished

    while waiting or loop.unfinished:
        if waiting and (rng.random() < 0.3 or not loop.unfinished):
            request = waiting.pop()
            running[request.submit(loop)] = request
        take(loop.step())
        if loop.stats.calls % 60 == 59 and loop.unfinished:
            schedule = loop._schedule
            victim = rng.choice([s.number for s in (*schedule.waiting, *schedule.running)])
            loop.abort(victim)
            aborted.add(victim)
            take(loop.step())
    assert loop.manager.active_slots == []
    for number, request in running.items():
        options = dict(request.options)
        for j in range(options.pop("num_samples")):
            options["seed"] = dict(request.options)["seed"] + j
            expected = alone(dataclasses.replace(request, options=tuple(options.items())))
            got = tokens[number, j]
            assert got == (expected[: len(got)] if number in aborted else expected)
            assert (ends[number, j] == "aborted") == (number in aborted) or got == expected
    stats = loop.stats
    assert min(len(aborted), stats.preemptions, stats.hit_tokens, stats.accepted_tokens) > 0
