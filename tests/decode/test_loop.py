"""Continuous batching: whatever joins, leaves, waits or is preempted, a request gets the tokens it gets alone."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from loops import ENOUGH, TIGHT, ask, assert_idle, make_loop, programs_compiled, run

import dsv4_jax.decode
from dsv4_jax.decode import decode_steps, prefill_step

# A prompt of one token, one of many chunks, draws, a limit that is reached at once.
ASKS = [
    ask(20, 60),
    ask(1, 50, start=5),
    ask(45, 72, start=9, temperature=1.0, seed=3),
    ask(3, 52, start=4),
    ask(48, 49, start=2),
    ask(8, 65, start=6, temperature=0.7, seed=3, index=2),
]


def test_requests_join_and_leave_without_recompiling(model, alone):
    expected = [alone(request) for request in ASKS]
    assert [len(t) for t in expected] == [request.new for request in ASKS]
    compiled = programs_compiled(model)
    assert min(compiled) > 0
    for late in ((0, 0, 1, 2, 2, 7), (0, 1, 2, 9, 10, 11)):
        loop = make_loop(model)
        tokens, number, call = {}, {}, 0
        while len(number) < len(ASKS) or loop.unfinished:
            for i, when in enumerate(late):
                if i not in number and (call >= when or not loop.unfinished):
                    number[i] = ASKS[i].submit(loop)
            for event in loop.step():
                tokens.setdefault(event.request, []).extend(event.tokens)
            loop.manager.check()
            call += 1
        assert [tokens[number[i]] for i in range(len(ASKS))] == expected
        assert_idle(loop)
    assert programs_compiled(model) == compiled


def test_the_program_compiled_ahead_is_that_of_the_call(model, monkeypatch):
    """Beside the prompts' program, so that tokens flow once they begin."""
    monkeypatch.setattr(dsv4_jax.decode.loop, "_compiled", set())
    loop, asked, used = make_loop(model), [], []
    monkeypatch.setattr(loop._programs, "compile", lambda step, *operands: asked.append((step, operands[3:])))
    dispatch = loop._dispatch

    def spy(step, *operands):
        if step.func is loop._programs.over(decode_steps):
            used.append((step, operands))
        dispatch(step, *operands)

    monkeypatch.setattr(loop, "_dispatch", spy)
    ASKS[0].submit(loop)
    loop.compile_decode().join()
    assert loop.compile_decode() is None
    while not used:
        loop.step()

    def form(call):
        step, operands = call
        return step.keywords, jax.tree.map(lambda x: (x.shape, x.dtype), operands)

    assert form(asked[0]) == form(used[0])


def test_a_step_may_be_a_part_of_another_program(model, monkeypatch):
    """JAX refuses there what has compiler options, as the loop's own programs have."""
    loop, used = make_loop(model), {}
    programs, dispatch = loop._programs, loop._dispatch

    def spy(step, *operands):
        used[step.func] = step.keywords, operands
        dispatch(step, *operands)

    monkeypatch.setattr(loop, "_dispatch", spy)
    ASKS[1].submit(loop)
    while loop.unfinished:
        loop.step()
    for step in (prefill_step, decode_steps):
        keywords, operands = used[programs.over(step)]
        expected = jax.eval_shape(
            partial(step, programs.structure, **keywords), programs.weights, loop.manager.cache, *operands
        )
        lowered = jax.jit(partial(step, programs.structure, **keywords)).lower(
            programs.weights, loop.manager.cache, *operands
        )
        assert [x.shape for x in jax.tree.leaves(lowered.out_info)] == [x.shape for x in jax.tree.leaves(expected)]


def test_prompts_are_read_beside_decode(model, alone):
    """While a prompt of many chunks is read, the others get a token from every step."""
    loop = make_loop(model)
    first, second = ASKS[0].submit(loop), ASKS[1].submit(loop)
    while not any(event.tokens for event in loop.step() if event.request == first):
        pass
    ASKS[2].submit(loop)
    for done in (8, 16, 24, 32, 40, 45):
        events = {event.request: event for event in loop.step()}
        assert len(events[first].tokens) == len(events[second].tokens) == 1
        assert events[2].prompt_tokens == min(8, done - (done - 1) // 8 * 8)
    assert len(events[2].tokens) == 1


def test_stop_tokens_and_limits_are_per_request(model, alone):
    request = ASKS[0]
    stop = alone(request)[5]
    until = alone(request)[: alone(request).index(stop) + 1]
    stopping = dataclasses.replace(request, options=(("stop_tokens", (stop,)),))
    tokens, ends = run(make_loop(model), stopping, request, dataclasses.replace(request, new=30))
    assert tokens == {(0, 0): until, (1, 0): alone(request), (2, 0): alone(request)[:30]}
    assert ends == {(0, 0): "stop", (1, 0): "length", (2, 0): "length"}


def test_a_pool_that_serves_one_request_serves_all_one_after_the_other(model, alone):
    """The smallest pool: nothing is refused, nothing is dropped, nobody waits for ever."""
    longest = ask(30, 72, start=3)
    assert build_manager_needs(longest) == TIGHT
    requests = [longest, *ASKS]
    tokens, ends = run(make_loop(model, TIGHT), *requests)
    assert tokens == {(i, 0): alone(request) for i, request in enumerate(requests)}
    assert set(ends.values()) == {"length"}


def build_manager_needs(request):
    """Blocks for all tokens but the last, which is never written: 3 entries of 4 tokens a block."""
    return -(-((len(request.prompt) + request.new - 1) // 4) // 3)


def test_the_youngest_is_preempted_and_comes_back(model, alone):
    requests = [ask(6, 60), ask(7, 58, start=5, temperature=1.0, seed=8), ask(5, 50, start=2)]
    loop = make_loop(model, TIGHT)
    tokens, _ = run(loop, *requests)
    assert loop.stats.preemptions > 0
    assert tokens == {(i, 0): alone(request) for i, request in enumerate(requests)}
    assert loop.stats.prefilled_tokens == 6 + 7 + 5


def test_one_block_too_few_is_refused(model):
    loop = make_loop(model, TIGHT - 1)
    with pytest.raises(ValueError, match=r"72 tokens need 6 CSA blocks: this cache has 5 \(num_blocks_per_csa_layer\)"):
        ask(30, 72).submit(loop)
    assert (loop.unfinished, loop.step()) == (0, [])
    assert_idle(loop)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 4), {}, "the prompt is"),
        (([64], 4), {}, "token ids from 64 to 64: expected 0 to 63"),
        (([1], 0), {}, "max_new_tokens is 0: expected an integer, 1 or more"),
        (([1] * 90, 7), {}, "has at most 96"),
        (([1], 4), {"num_samples": 4}, "num_samples is 4: this cache has 3 slots"),
        (([1], 4), {"num_samples": 0}, "num_samples is 0"),
        (([1], 4), {"num_samples": 10**12}, "num_samples is 1000000000000: expected an integer from 1 to 4096"),
        (([1], 4), {"temperature": -1.0}, "temperature is -1"),
        (([1], 4), {"temperature": 1e39}, r"temperature is 1e\+39: .* at most 3.4028e\+38"),
        (([1], 4), {"seed": -1}, "seed is -1"),
        (([1], 4), {"index": 1 << 31}, "index is 2147483648: expected an integer from 0 to 2147483647"),
        (([1], 4), {"index": 0.5}, "index is 0.5: expected an integer"),
        (([[1], [2, 3]], 4), {}, "expected a list of one or more token ids"),
        (([1], 4), {"stop_tokens": [64]}, "stop_tokens are"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(model, arguments, options, message):
    loop = make_loop(model)
    with pytest.raises(ValueError, match=message):
        loop.submit(*arguments, **options)
    assert (loop.unfinished, loop.step()) == (0, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"decode_chunk": 0}, "decode_chunk is 0"),
        ({"step_tokens": 2}, "step_tokens is 2: expected one for each of 3 slots"),
        ({"draft_tokens": 1}, "draft_tokens is 1: expected 0 to max_rollback = 0"),
    ],
)
def test_bad_sizes_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_loop(model, **options)


def test_what_is_no_model_or_no_manager(model):
    manager = make_loop(model).manager
    for given, message in (
        ((None, manager), "model is None: expected a DSV4Model"),
        ((model, None), "manager is a NoneType: expected a KVCacheManager or a ShardedKVCacheManager, such as"),
        ((model, model), "manager is a DSV4Model: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dsv4_jax.decode.DecodeLoop(*given)
    with pytest.raises(ValueError, match=r"^model is None: expected a DSV4Model"):
        dsv4_jax.shard_model(None, None)


@pytest.mark.parametrize("phase", ["queued", "prefilling", "decoding", "preempted"])
def test_abort_in_every_phase(model, alone, phase):
    """The others get what they get alone, and nothing of the aborted request stays."""
    others = [ask(6, 60), ask(7, 58, start=5)]
    victim = ask(40, 66, start=11) if phase == "prefilling" else ask(5, 50, start=2)
    loop = make_loop(model, TIGHT if phase == "preempted" else ENOUGH)
    others += [ask(4, 60, start=8)] if phase == "queued" else []
    for request in (*others, victim):
        request.submit(loop)
    mine = len(others)
    schedule, tokens, ended = loop._schedule, {number: [] for number in range(mine + 1)}, None

    def reached():
        waiting = [s for s in schedule.waiting if s.number == mine]
        running = [s for s in schedule.running if s.number == mine]
        return {
            "queued": waiting and not waiting[0].computed,
            "prefilling": running and 0 < running[0].computed < 40,
            "decoding": running and len(running[0].ids) > 8,
            "preempted": waiting and waiting[0].snapshot,
        }[phase]

    while loop.unfinished or ended is None:
        for event in loop.step():
            tokens[event.request] += event.tokens
            if event.request == mine and event.finished:
                ended = event.finished
        if ended is None and reached():
            loop.abort(mine)
            loop.manager.check()
            with pytest.raises(ValueError, match=f"request {mine} neither waits nor runs"):
                loop.abort(mine)
            ended = "waiting for the event"
    assert ended == "aborted"
    assert [tokens[i] for i in range(mine)] == [alone(request) for request in others]
    assert tokens[mine] == alone(victim)[: len(tokens[mine])]
    assert_idle(loop)


def test_same_bits_alone_and_among_15_others(model):
    """A request in a slot of 16, the others empty or taken, in fp8: the same logits to the last bit.

    (The others read prompts of no more chunks: the rounding of a product may follow from the shape of the step.)
    """
    request = ask(21, 60, temperature=1.0, seed=5)

    def logits_of_the_first(others):
        loop = make_loop(model, blocks=96, slots=16, cache_dtype="fp8", step_tokens=128, return_logits=True)
        numbers = [other.submit(loop) for other in others[:4]]
        mine = request.submit(loop)
        numbers += [other.submit(loop) for other in others[4:]]
        loop.step()
        if numbers:
            loop.abort(numbers[2])
        return [
            row for event in loop for row in (event.logits if event.logits is not None else ()) if event.request == mine
        ]

    alone = np.stack(logits_of_the_first([]))
    among = np.stack(logits_of_the_first([ask(1 + i, 49 + i, start=i, temperature=0.1 * i) for i in range(15)]))
    assert alone.shape == (39, 64)
    np.testing.assert_array_equal(alone.view(np.uint32), among.view(np.uint32))
