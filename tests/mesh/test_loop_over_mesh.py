"""A request gets the same tokens and logits on any shard of any mesh, whatever happens beside it."""

import re

import jax
import numpy as np
import pytest
from loops import ask

from dsv4_jax import PrefixPolicy
from dsv4_jax.cache.sharding import check_mesh
from dsv4_jax.decode import DecodeLoop
from dsv4_jax.decode.programs import OverMesh

# Ends at more than 48 and at most 72 tokens: readers look at 6 blocks.
ASKS = [
    ask(20, 60), ask(33, 70, 2), ask(5, 50, 3, temperature=0.8, seed=5), ask(41, 72, 4), ask(12, 66, 5),
    ask(30, 58, 6, temperature=1.3, seed=9), ask(22, 71, 7), ask(9, 49, 8), ask(50, 64, 9),
]  # fmt: skip


def run(loop, asks, on_event=lambda event: None):
    """Submits, walks the loop -> by (request, sample) its tokens and logits, and how each ended."""
    numbers = [one.submit(loop) for one in asks]
    tokens, logits, ends = {}, {}, {}
    for event in loop:
        key = event.request, event.sample
        tokens.setdefault(key, []).extend(event.tokens)
        if event.tokens:
            logits.setdefault(key, []).append(event.logits)
        if event.finished:
            ends[key] = event.finished
        loop.manager.check()
        on_event(event)
    assert loop.manager.active_slots == []
    return numbers, {key: (tokens[key], np.concatenate(logits[key])) for key in logits}, ends


def assert_same(got, expected):
    assert got[0] == expected[0]
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=2e-5)


def home(loop):
    """Which shards each sample runs on, as the loop goes on."""
    seen = {}

    def look(event):
        for s in loop._schedule.running:
            seen.setdefault((s.number, s.index), set()).add(loop._schedule.shard_of(s))

    return seen, look


# Two shards of two devices each, which divide heads and the shared expert; programs are compiled for these alone.
TWO, FOUR = (2, 2), 4


@pytest.mark.parametrize(("shape", "shards"), [(TWO, 2), (FOUR, 4)])
def test_alone_on_any_shard(make_loop, alone, shape, shards):
    loop = make_loop(shape)
    for shard in range(1, shards, 2):  # in company, others are on all of them
        # Somebody else has all other slots.
        others = [
            loop.manager.admit_request(shard=other) for other in range(shards) if other != shard for _ in range(2)
        ]
        number = ASKS[1].submit(loop)
        seen, look = home(loop)
        events = []
        for event in loop:
            look(event)
            events.append(event)
        got = [t for e in events for t in e.tokens], np.concatenate([e.logits for e in events if e.tokens])
        assert_same(got, alone(ASKS[1]))
        assert set.union({shard}, *seen.values()) == {shard}
        assert {e.request for e in events} == {number}
        for slot in others:
            loop.manager.release_request(slot)


@pytest.mark.parametrize("shape", [TWO, FOUR])
def test_company_joins_aborts_and_preemption(make_loop, alone, shape):
    loop = make_loop(shape)
    seen, look = home(loop)
    late, aborted, steps = list(ASKS[6:]), [], 0

    def on_event(event):
        nonlocal steps
        look(event)
        steps += 1
        if late and steps % 9 == 0:
            late.pop(0).submit(loop)
        if event.request == 4 and event.tokens and not aborted:
            aborted.append(loop.abort(4))

    _, got, ends = run(loop, ASKS[:6], on_event)
    assert ends.pop((4, 0)) == "aborted"
    assert len(ends) == len(ASKS) - 1
    assert set(ends.values()) == {"length"}
    for (number, _), result in got.items():
        if number != 4:
            assert_same(result, alone(ASKS[number]))
    if shape == TWO:
        assert loop.stats.preemptions > 0
        assert any(len(shards) > 1 for shards in seen.values()), "nobody moved to another shard"


def test_snapshots_go_between_shards_and_loops(make_loop, alone):
    wide, narrow = make_loop(4), make_loop(0)
    numbers = [one.submit(wide) for one in ASKS[:3]]
    more = dict.fromkeys(numbers, 0)
    for event in wide:
        more[event.request] += len(event.tokens)
        if all(n > 5 for n in more.values()):
            break
    taken = {number: wide.snapshot(number) for number in numbers}
    assert all(s.samples[0].cache is not None for s in taken.values())
    for number in numbers:
        wide.abort(number)
    list(wide)
    # On one device, and on a mesh again: the order decides the shard.
    moved = {narrow.adopt(taken[0]): 0}
    rest = {0: []}
    for event in narrow:
        rest[moved[event.request]] += event.tokens
    back = {wide.adopt(taken[number]): number for number in (2, 1)}
    for event in wide:
        rest.setdefault(back[event.request], []).extend(event.tokens)
    for number in numbers:
        before = taken[number].samples[0].ids[len(ASKS[number].prompt) :]
        assert [*before, *rest[number]] == alone(ASKS[number])[0]


def test_a_mesh_in_context_changes_nothing(make_loop, alone):
    expected = alone(ASKS[0])[0]
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        loop = make_loop(4)
        number = ASKS[0].submit(loop)
        while not any(event.tokens for event in loop.step()):
            pass
        taken = loop.snapshot(number)
        loop.abort(number)
        again = loop.adopt(taken)
        rest = [t for event in loop for t in event.tokens if event.request == again]
        loop.manager.check()
    assert taken.samples[0].cache is not None
    assert [*taken.samples[0].ids[len(ASKS[0].prompt) :], *rest] == expected


def test_prefix_hits_decide_the_shard(make_loop, alone):
    loop = make_loop(TWO, {"prefix": PrefixPolicy("full")})
    first, busy, like = ask(40, 52), ask(30, 60, 3), ask(47, 60)
    assert like.prompt[:40] == first.prompt
    seen, look = home(loop)
    run(loop, [first], look)
    # The shard that has the blocks gets the prompt, though it has more to do.
    loop.manager.admit_request(shard=0)
    numbers, hits = [one.submit(loop) for one in (like, busy)], loop.stats.hit_tokens
    got = {number: [] for number in numbers}
    for event in loop:
        look(event)
        got[event.request] += event.tokens
    assert loop.stats.hit_tokens - hits == 36
    assert seen[(0, 0)] == seen[(numbers[0], 0)] == {0}
    assert seen[(numbers[1], 0)] == {1}
    assert got[numbers[0]] == alone(like)[0]
    assert got[numbers[1]] == alone(busy)[0]


def test_samples_stay_on_a_shard(make_loop):
    one, two = make_loop(0), make_loop(TWO)
    several = [ask(17, 50, 1, num_samples=2, temperature=1.0, seed=3), ask(25, 55, 2, num_samples=2, temperature=1.0)]
    seen, look = home(two)
    expected, got = run(one, several)[1], run(two, several, look)[1]
    assert expected.keys() == got.keys()
    for key, result in got.items():
        assert_same(result, expected[key])
    assert seen[0, 0] == seen[0, 1] != seen[1, 0] == seen[1, 1]


@pytest.mark.parametrize("shape", [TWO, FOUR])
def test_the_compiled_step_updates_every_device_in_place(make_loop, say, shape):
    """Per device the whole cache is aliased, and nothing of a cache's shape goes to other devices."""
    loop = make_loop(shape)
    manager, programs = loop.manager, loop._programs
    compiled = {}

    def spy(step, *operands):
        compiled[step.func.__name__] = programs.compile(step, programs.structure, programs.weights, *operands)
        raise KeyboardInterrupt

    for name in ("prefill", "decode"):
        loop._dispatch = lambda step, *operands: spy(step, programs.shapes(manager.cache), *operands)
        number = ASKS[0].submit(loop)
        if name == "decode":
            del loop._dispatch
            while any(s.reading for s in loop._schedule.running) or not loop._schedule.running:
                loop.step()
            loop._dispatch = lambda step, *operands: spy(step, programs.shapes(manager.cache), *operands)
        with pytest.raises(KeyboardInterrupt):
            loop.step()
        loop.abort(number)
    assert len(compiled) == 2
    part = sum(x.nbytes for x in jax.tree.leaves(manager.cache)) // manager.num_shards
    assert part == manager.shards[0].memory_bytes()
    shapes = {x.shape for x in jax.tree.leaves(manager.cache)} | {
        x.shape for x in jax.tree.leaves(manager.shards[0].cache)
    }
    for name, program in compiled.items():
        memory, text = program.memory_analysis(), program.as_text()
        assert memory.alias_size_in_bytes == part, name
        exchanged = {
            tuple(map(int, sizes.split(",")))
            for sizes in re.findall(
                r"\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\(", text
            )
        }
        assert exchanged, name
        assert not exchanged & shapes, name
        aliased = f"{memory.alias_size_in_bytes:,} of {part:,} bytes of a device aliased"
        say(f"{shape}, {name}: {aliased}, exchanged {exchanged}")


def test_the_program_compiled_ahead_is_that_of_the_call(make_loop, monkeypatch):
    loop, asked, used = make_loop(FOUR), [], []
    monkeypatch.setattr(loop._programs, "compile", lambda step, *operands: asked.append(operands[3:]))
    dispatch = loop._dispatch

    def spy(step, *operands):
        if step.func.__name__ == "_decode_over_mesh":
            used.append(operands)
        dispatch(step, *operands)

    monkeypatch.setattr(loop, "_dispatch", spy)
    ASKS[0].submit(loop)
    loop.compile_decode().join()
    while not used:
        loop.step()

    def form(operands):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), operands)

    assert form(asked[0]) == form(used[0])


def test_a_loop_takes_a_model_and_a_cache_of_one_mesh(model, make_manager):
    for n, m in ((0, 2), (TWO, 0), (TWO, 2)):
        with pytest.raises(ValueError, match=r"^the model lies on .* and the cache on .*: expected shard_model"):
            DecodeLoop(model(n), make_manager(m))


class _Never:
    """What a device computes together with one that is no more."""

    def is_ready(self):
        return False


class _Failed:
    """The same, where the connection tells."""

    def is_ready(self):
        return True

    def block_until_ready(self):
        raise jax.errors.JaxRuntimeError("UNKNOWN: connection closed by peer")


def test_a_process_that_ended_is_not_waited_for(model, mesh):
    programs = OverMesh(model(2), check_mesh(mesh(2)), process_timeout_s=0.01)
    with pytest.raises(RuntimeError, match=r"took no part in this call for 0.01 s: .* end them all and start again$"):
        programs._when_ready(_Never())
    with pytest.raises(RuntimeError, match=r"one may have ended .*closed by peer.* end them all and start again$"):
        programs._when_ready(_Failed())


def test_a_process_timeout_is_some_time(make_loop):
    with pytest.raises(ValueError, match="process_timeout_s is 0: expected seconds, more than 0"):
        make_loop(2, process_timeout_s=0)


def test_processes_that_differ_are_told_in_what(make_loop, monkeypatch):
    """Each asks for the largest of both; -1 stands for none."""
    loop = make_loop(2)
    sizes, other = {"slots": 2, "log_probs": -1, "the cache": 7}, {"slots": 3, "log_probs": 0, "the cache": 7}
    numbers = [*other.values(), *(-n for n in other.values())]
    monkeypatch.setattr(loop._programs, "agree", lambda own: [max(x) for x in zip(own, numbers, strict=True)])
    loop._compare(other)
    with pytest.raises(
        ValueError, match=r"^the processes' loops differ in slots \(2 here\) and log_probs \(none here\): "
    ):
        loop._compare(sizes)
    with pytest.raises(ValueError, match=r"^the processes' loops differ in the cache: expected the same in all$"):
        loop._compare({**other, "the cache": 3})
