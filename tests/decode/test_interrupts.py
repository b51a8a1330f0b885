"""Whatever interrupts a call of the loop, and wherever: it goes on with the same tokens, and nothing leaks."""

import contextlib
import dis
import logging
import os
from pathlib import Path

import jax
import pytest
from interrupt import Interrupt, hears
from loops import ask, assert_idle, make_loop

import dsv4_jax.decode
from dsv4_jax import PrefixPolicy
from dsv4_jax.decode import DecodeLoop
from dsv4_jax.decode.programs import OneDevice

FOLDER = Path(dsv4_jax.decode.__file__).parent
# At every moment when Python hears signals, instead of the first and the last at a sixth of the places in the code.
ALL = bool(os.environ.get("DSV4_INTERRUPT_ALL"))


def walk(loop, requests, interrupt):
    """Tokens by (request, sample) of a loop that is called again after an interrupt."""
    numbers = [request.submit(loop) for request in requests]
    tokens = {}
    with interrupt:
        while True:
            try:
                if not loop.unfinished:
                    return tokens
                events = loop.step()
            except KeyboardInterrupt:
                continue
            for event in events:
                tokens.setdefault((event.request - numbers[0], event.sample), []).extend(event.tokens)


SCENES = {
    # Prefill, decode calls past an edge of a block, replies that are kept, a sample that forks off.
    "kept": (
        [ask(40, 52), ask(44, 50, start=4, temperature=1.0, num_samples=2)],
        {"prefix": PrefixPolicy("full"), "decode_chunk": 16, "prefill_chunk": 48},
    ),
    # Blocks run out: the youngest leaves and comes back; drafts are rejected.
    "tight": (
        [ask(44, 52), ask(44, 50, start=3)],
        {"blocks": 6, "slots": 2, "max_rollback": 2, "draft_tokens": 2, "prefill_chunk": 44},
    ),
}


@pytest.mark.parametrize("scene", SCENES)
def test_ctrl_c_at_every_moment(model, scene, say):
    requests, options = SCENES[scene]
    expected = walk(make_loop(model, **options), requests, contextlib.nullcontext())
    watch = Interrupt(FOLDER)
    assert walk(make_loop(model, **options), requests, watch) == expected
    first, last = {}, {}
    for n, place in enumerate(watch.places, 1):
        first.setdefault(place, n)
        last[place] = n
    points = range(1, watch.count + 1) if ALL else sorted({*first.values(), *last.values()})[::6]
    loop = make_loop(model, **options)
    restarts = 0
    for at in points:
        if options.get("prefix"):
            loop.manager.reset()  # what one run keeps, the next would find
        restarts -= loop.stats.restarts
        tokens = walk(loop, requests, interrupt := Interrupt(FOLDER, at))
        restarts += loop.stats.restarts
        assert interrupt.count >= at, f"{at} of {watch.count} was not reached"
        assert tokens == expected, f"interrupted at moment {at}: {watch.places[at - 1]}"
        assert_idle(loop)
    say(f"interrupted at {len(points)} of {watch.count} moments ({len(first)} places), {restarts} samples read again")


@pytest.mark.parametrize("function", [DecodeLoop.step, DecodeLoop.__iter__])
def test_no_signal_is_heard_between_taking_events_and_handing_them_out(function):
    instructions = list(dis.get_instructions(function))
    hand_out = "RETURN_VALUE" if function is DecodeLoop.step else "YIELD_VALUE"
    (end,) = (i for i, x in enumerate(instructions) if x.opname == hand_out)
    since = max(i for i in range(end) if hears(instructions[i]))
    assert "DELETE_SUBSCR" in [x.opname for x in instructions[since:end]]


def by_step(loop, take):
    take(loop.step())


def by_iterator(loop, take):
    for event in loop:
        take([event])


@pytest.mark.parametrize("call", [by_step, by_iterator])
def test_no_event_is_lost(model, alone, call):
    """Ctrl-C at every moment of `step` and of the iterator themselves, the first time and the last."""
    requests = [ask(10, 52), ask(3, 49, start=4)]
    expected = [alone(r) for r in requests]

    def run(interrupt):
        loop, tokens = make_loop(model), {}
        numbers = [r.submit(loop) for r in requests]

        def take(events):
            for event in events:
                tokens.setdefault(event.request, []).extend(event.tokens)

        while loop.unfinished:
            try:
                with interrupt:
                    call(loop, take)
            except KeyboardInterrupt:
                continue
        return [tokens[n] for n in numbers]

    watch, own = Interrupt(FOLDER / "loop.py"), {}
    assert run(watch) == expected
    for n, (_, function, *place) in enumerate(watch.places, 1):
        if function in ("step", "__iter__"):
            own.setdefault(tuple(place), []).append(n)
    assert own
    for place, moments in own.items():
        for at in {moments[0], moments[-1]}:
            assert run(Interrupt(FOLDER / "loop.py", at)) == expected, place


@pytest.mark.parametrize("name", ["decode_steps", "prefill_step"])
@pytest.mark.parametrize("lost", ["before", "donated", "poisoned"])
def test_a_step_that_fails(model, alone, monkeypatch, caplog, name, lost):
    """Before it takes the cache; having taken it; and where the device says so only when results are asked for."""
    requests = [ask(10, 52), ask(3, 49, start=4)]
    for call in (1, 2):
        loop, calls = make_loop(model), 0
        real = OneDevice(model).over(getattr(dsv4_jax.decode.steps, name))

        def step(*operands, call=call, real=real, **options):
            nonlocal calls
            calls += 1
            if calls != call:
                return real(*operands, **options)
            if lost == "before":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            *results, cache = real(*operands, **options)
            if lost == "donated":
                raise RuntimeError("INTERNAL: failed")
            for x in jax.tree.leaves(results):
                x.delete()  # whoever asks for it gets a RuntimeError
            return *results, cache

        monkeypatch.setattr(dsv4_jax.decode.loop, name, step)
        numbers, tokens, failures = [r.submit(loop) for r in requests], {}, 0
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            while loop.unfinished:
                try:
                    for event in loop.step():
                        tokens.setdefault(event.request, []).extend(event.tokens)
                except RuntimeError:
                    failures += 1
        assert failures == 1
        assert [tokens[n] for n in numbers] == [alone(r) for r in requests]
        assert ("the cache was lost" in caplog.text) == (lost != "before")
        assert (loop.stats.restarts > 0) or lost == "before"
        assert_idle(loop)


def test_leaving_the_iterator_loses_nothing(model, alone):
    loop, tokens = make_loop(model), {}
    requests = [ask(10, 52), ask(3, 49, start=4)]
    numbers = [r.submit(loop) for r in requests]
    while loop.unfinished:
        for event in loop:
            tokens.setdefault(event.request, []).extend(event.tokens)
            break
    assert [tokens[n] for n in numbers] == [alone(r) for r in requests]
