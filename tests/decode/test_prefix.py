"""Prompts that begin like earlier ones: the loop reads the rest, and says what it found."""

import dataclasses

import pytest
from loops import TIGHT, Ask, ask, make_loop, run

from dsv4_jax import PrefixPolicy

FIRST = ask(45, 72, start=9)
SECOND = Ask((*FIRST.prompt[:40], 1, 2, 3), 20)  # three blocks of 12 tokens in common


def salted(request, salt):
    return dataclasses.replace(request, options=(*request.options, ("salt", salt)))


# "periodic" computes again what follows the last multiple of its period, "zero" (window - 1) * layers + … tokens before
# the end of the hit, from the edge of a block on.
@pytest.mark.parametrize(("policy", "again"), [("full", 0), ("periodic", 12), ("zero", 24)])
def test_a_prompt_goes_on_from_the_blocks_of_another(model, alone, policy, again):
    loop = make_loop(model, prefix=PrefixPolicy(policy, period=24))
    assert run(loop, FIRST)[0] == {(0, 0): alone(FIRST)}
    assert (loop.stats.hit_tokens, loop.stats.prefilled_tokens) == (0, 45)
    assert run(loop, SECOND)[0] == {(1, 0): alone(SECOND)}
    assert (loop.stats.hit_tokens, loop.stats.recomputed_tokens) == (36, again)
    assert loop.stats.prefilled_tokens == 45 + 43 - 36 + again
    assert run(loop, salted(SECOND, b"somebody else"))[0] == {(2, 0): alone(SECOND)}
    assert loop.stats.hit_tokens == 36


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_preempted_in_the_middle_of_a_hit(model, alone, calls):
    """Before what was found is complete nothing can be taken out: such a request begins once more."""
    loop = make_loop(model, prefix=PrefixPolicy("zero", period=36))
    run(loop, FIRST)
    SECOND.submit(loop)
    events = [event for _ in range(calls) for event in loop.step()]
    loop._whole(loop._schedule.preempt_youngest)
    assert loop.manager.active_slots == []
    events += loop
    assert [token for event in events for token in event.tokens] == alone(SECOND)
    assert loop.stats.preemptions == 1


def test_kept_blocks_go_when_requests_need_them(model, alone):
    """The smallest pool: what is kept never keeps a request from running, and a hit stays right."""
    loop = make_loop(model, TIGHT, prefix=PrefixPolicy("full", period=36))
    other = ask(40, 72, start=20)
    for i, request in enumerate((FIRST, SECOND, other, FIRST)):
        assert run(loop, request)[0] == {(i, 0): alone(request)}
    assert loop.stats.hit_tokens == 36  # when FIRST comes back, nothing is left of it


def test_samples_of_a_prompt_that_was_found(model, alone):
    """Even where all of a prompt but its last token was found."""
    whole = Ask(FIRST.prompt[:37], 20, (("temperature", 1.0), ("seed", 2)))
    loop = make_loop(model, prefix=PrefixPolicy("full", period=36))
    run(loop, FIRST)
    tokens, _ = run(loop, dataclasses.replace(whole, options=(*whole.options, ("num_samples", 2))))
    expected = [dataclasses.replace(whole, options=(("temperature", 1.0), ("seed", 2 + j))) for j in range(2)]
    assert tokens == {(1, j): alone(request) for j, request in enumerate(expected)}
    assert (loop.stats.hit_tokens, loop.stats.prefilled_tokens) == (36, 45 + 1)


def test_a_conversation_finds_all_but_its_last_block(model, alone):
    """What a request decoded is kept like what it read."""
    loop = make_loop(model, prefix=PrefixPolicy("full"))
    text, number = ask(10, 50).prompt, 0
    for until in (50, 56, 62, 70):
        found = loop.stats.hit_tokens
        request = Ask(text, until - len(text))
        tokens, _ = run(loop, request)
        assert tokens == {(number, 0): alone(request)}
        if number:
            assert loop.stats.hit_tokens - found >= (len(text) - 3) // 12 * 12
        text, number = (*text, *tokens[number, 0], number, 1), number + 1
    assert loop.stats.hit_tokens == 48 + 48 + 60


def test_only_blocks_that_are_not_shared_count_at_admission(model, alone):
    """Three users of one text of three blocks, each with one of their own: 6 blocks hold all of them at once."""
    loop = make_loop(model, blocks=6, prefix=PrefixPolicy("full"))
    system = FIRST.prompt[:36]
    run(loop, Ask((*system, 1), 12))
    requests = [Ask((*system, 2 + i), 12) for i in range(3)]
    for request in requests:
        request.submit(loop)
    loop.step()
    assert len(loop.manager.active_slots) == 3
    list(loop)
    assert loop.stats.preemptions == 0
