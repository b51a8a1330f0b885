"""Several samples of one prompt: the prompt is read once, then each goes on as a request of its own would."""

import dataclasses

import pytest
from loops import ENOUGH, TIGHT, ask, assert_idle, make_loop, run

PROMPT = ask(21, 60, start=3, temperature=1.0, seed=7)


def of_seed(request, seed):
    return dataclasses.replace(request, options=(("temperature", 1.0), ("seed", seed)))


def samples(request, number):
    return dataclasses.replace(request, options=(*request.options, ("num_samples", number)))


@pytest.mark.parametrize("blocks", [ENOUGH, TIGHT])
def test_samples_are_what_runs_of_their_seeds_give(model, alone, blocks):
    """With blocks for all, and with blocks for one, where the others wait outside the cache."""
    loop = make_loop(model, blocks)
    tokens, ends = run(loop, samples(PROMPT, 3))
    assert tokens == {(0, j): alone(of_seed(PROMPT, 7 + j)) for j in range(3)}
    assert set(ends.values()) == {"length"}
    assert loop.stats.prefilled_tokens == 21


def test_samples_wait_for_slots_beside_others(model, alone):
    """Three samples need three slots at once: they come when there are as many, and whoever comes later waits."""
    before, after = ask(6, 60), ask(5, 50, start=2)
    tokens, _ = run(make_loop(model), before, samples(PROMPT, 3), after)
    assert tokens == {
        (0, 0): alone(before),
        **{(1, j): alone(of_seed(PROMPT, 7 + j)) for j in range(3)},
        (2, 0): alone(after),
    }


def test_samples_of_one_token_need_no_fork(model, alone):
    request = ask(50, 51, temperature=1.0, seed=7)
    tokens, _ = run(make_loop(model), samples(request, 3))
    assert tokens == {(0, j): alone(of_seed(request, 7 + j)) for j in range(3)}


def test_abort_ends_all_samples(model):
    """Before they part and after."""
    for calls in (1, 4):
        loop = make_loop(model)
        samples(PROMPT, 3).submit(loop)
        for _ in range(calls):
            loop.step()
        loop.abort(0)
        assert sorted((e.sample, e.finished) for e in loop.step()) == [(0, "aborted"), (1, "aborted"), (2, "aborted")]
        assert_idle(loop)
