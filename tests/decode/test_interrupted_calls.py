"""Every call of a loop, broken off at any moment in the loop and of the cache below it, and refused by the device.

A call has happened or has not; made again, every request gets the tokens of a run that nothing disturbed.
"""

import contextlib
import os
from pathlib import Path

import pytest
from interrupt import Interrupt
from loops import ask, assert_idle, make_loop

import dsv4_jax
from dsv4_jax import PrefixPolicy
from dsv4_jax.cache.transfer import slots
from dsv4_jax.decode.programs import OneDevice

FOLDER = Path(dsv4_jax.__file__).parent
# At every moment when Python hears signals, instead of the first and the last at some of the places in the code.
ALL = bool(os.environ.get("DSV4_INTERRUPT_ALL"))
REQUESTS = [ask(20, 52), ask(17, 60, start=3, temperature=1.0, num_samples=2), ask(9, 49, start=4)]
BROKEN = (KeyboardInterrupt, MemoryError, RuntimeError)


class User:
    """Who makes all calls of a loop, and each again until it comes to an end."""

    def __init__(self, loop):
        self.loop, self.next = loop, loop.submit([1], 1) + 1
        loop.abort(self.next - 1)
        loop.step()
        self.tokens, self.ends = {}, {}

    def until_done(self, call, happened=lambda: False):
        """Makes a call again unless it has happened -> what it returns, None where that was lost."""
        while True:
            try:
                return call()
            except BROKEN:
                if happened():
                    return None

    def queue(self, call):
        """A call that queues a request -> its number."""
        unfinished = self.until_done(lambda: self.loop.unfinished)
        number = self.until_done(call, lambda: self.loop.unfinished > unfinished)
        self.next += 1
        assert number in (None, self.next - 1)
        return self.next - 1

    def take(self, events):
        for event in events:
            key = event.request, event.sample
            assert key not in self.ends, f"{key} had ended"
            self.tokens.setdefault(key, []).extend(event.tokens)
            if event.finished:
                self.ends[key] = event.finished

    def iterate(self):
        for event in self.loop:
            self.take([event])

    def abort(self, number):
        with contextlib.suppress(ValueError):  # it had happened
            self.until_done(lambda: self.loop.abort(number))

    def play(self, interrupt):
        """Tokens of each sample, by the request's place: of one aborted as far as it came, of one adopted all."""
        loop = self.loop
        with interrupt:
            first, second = (self.queue(lambda r=r: r.submit(loop)) for r in REQUESTS[:2])
            for _ in range(2):
                self.take(self.until_done(loop.step))
            third = self.queue(lambda: REQUESTS[2].submit(loop))
            self.take(self.until_done(loop.step))
            snapshot = self.until_done(lambda: loop.snapshot(second))
            self.abort(second)
            adopted = self.queue(lambda: loop.adopt(snapshot))
            self.until_done(self.iterate)
        assert self.ends.pop((second, 0)) == self.ends.pop((second, 1)) == "aborted"
        texts = {(0, 0): self.tokens[first, 0], (2, 0): self.tokens[third, 0]}
        for s in snapshot.samples:
            known = list(s.ids[len(REQUESTS[1].prompt) :])
            texts[1, s.index] = known + self.tokens[adopted, s.index]
            before = self.tokens.get((second, s.index), [])
            assert before == known[: len(before)]
        assert set(self.ends.values()) == {"length"}
        return texts


SCENES = {  # as in test_interrupts.py, whose programs serve here too
    # What others read and decoded is kept, and given up where blocks run out.
    "kept": {"prefix": PrefixPolicy("full"), "decode_chunk": 16, "prefill_chunk": 48},
    # Blocks run out: the youngest leave and come back; drafts are rejected.
    "tight": {"blocks": 6, "slots": 2, "max_rollback": 2, "draft_tokens": 2, "prefill_chunk": 44},
}


@pytest.fixture(params=SCENES)
def scene(request, model):
    """A loop, and what its requests get."""
    loop = make_loop(model, **SCENES[request.param])
    return request.param, loop, User(loop).play(contextlib.nullcontext())


def undisturbed(loop, interrupt):
    if loop.manager.prefix_policy is not None:
        loop.manager.reset()  # what one run keeps, the next would find
    texts = User(loop).play(interrupt)
    assert_idle(loop)
    return texts


def test_broken_off_at_every_moment(scene, alone, say):
    name, loop, expected = scene
    assert expected[0, 0] == alone(REQUESTS[0])
    watch = Interrupt(FOLDER)
    assert undisturbed(loop, watch) == expected
    first, last = {}, {}
    for n, place in enumerate(watch.places, 1):
        first.setdefault(place, n)
        last[place] = n
    points = sorted({*first.values(), *last.values()})
    points = range(1, watch.count + 1) if ALL else points[:: len(points) // 18]
    restarts = loop.stats.restarts
    for i, at in enumerate(points):
        error = MemoryError if i % 4 == 3 else KeyboardInterrupt
        interrupt = Interrupt(FOLDER, at, error)
        assert undisturbed(loop, interrupt) == expected, f"{error.__name__} at {at}: {watch.places[at - 1]}"
    say(
        f"{name}: broken off at {len(points)} of {watch.count} moments ({len(first)} places), "
        f"{loop.stats.restarts - restarts} samples read again"
    )


DEVICE = [
    (slots, "_enter"), (slots, "_read_rows"), (slots, "_write_slot"), (slots, "_read_blocks"), (slots, "_write_blocks"),
    (dsv4_jax.cache.holder, "copy_slot"), (OneDevice, "put"), (OneDevice, "fetch"),
]  # fmt: skip


def test_refused_by_the_device(scene, monkeypatch, say):
    """Every transfer of the loop and of its manager fails once, before anything happened."""
    name, loop, expected = scene
    refused = {}
    for module, function in DEVICE:
        real = getattr(module, function)
        for n in (1, 2, 5):
            calls = 0

            def refuse(*operands, n=n, real=real):
                nonlocal calls
                calls += 1
                if calls == n:
                    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                return real(*operands)

            with monkeypatch.context() as patch:
                patch.setattr(module, function, refuse)
                assert undisturbed(loop, contextlib.nullcontext()) == expected, f"{function}, call {n}"
            if calls < n:
                break
            refused[function] = refused.get(function, 0) + 1
    say(f"{name}: refused once each: {refused}")
    assert sum(refused.values()) > 8
