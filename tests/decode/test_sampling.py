"""How tokens are chosen: limits, the generator, log-probabilities, the hook on the logits, stop texts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import TIGHT, Ask, ask, make_loop, run

from dsv4_jax.decode import LogitsHook
from dsv4_jax.decode.sampling import Draws, _gumbel, _likely, choose_tokens

REQUEST = ask(10, 52, temperature=1.0, seed=5)


def start(tokens, argument):
    """Which tokens came so far, and from which token on they are forbidden."""
    seen = np.zeros(64, bool)
    seen[list(tokens)] = True
    return {"seen": seen, "from": np.int32(64 if argument is None else argument)}


ONCE = LogitsHook(
    start=start,
    apply=lambda state, logits: jnp.where(state["seen"] & (jnp.arange(64) >= state["from"]), -jnp.inf, logits),
    advance=lambda state, token: {**state, "seen": state["seen"].at[token].set(True)},
)
# Loops of one kind, so that few programs are compiled.
ALL = {"return_logits": True, "log_probs": 2, "logits_hook": ONCE}


def with_options(request, **options):
    return dataclasses.replace(request, options=(*request.options, *options.items()))


def expected_limits(logits, top_k, top_p, min_p):
    """By sorting, one row."""
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= logits >= np.sort(logits)[-min(top_k, len(logits))]
    weights = np.where(kept, np.exp(logits), 0)
    if top_p < 1:
        order = np.argsort(-weights)
        enough = np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum()) + 1
        kept &= weights >= weights[order[enough - 1]]
    return kept & (weights >= min_p)


def test_limits(rng):
    rows = [
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (1, 1.0, 0.0),
        (0, 0.6, 0.0),
        (40, 0.9, 0.0),
        (0, 1.0, 0.3),
        (20, 0.8, 0.1),
        (99, 0.5, 0),
    ]
    logits = rng.standard_normal((len(rows), 64)).astype(np.float32) * 2
    logits -= logits.max(axis=1, keepdims=True)
    top_k, top_p, min_p = (np.array(x, dtype) for x, dtype in zip(zip(*rows, strict=True), "iff", strict=True))
    kept = np.isfinite(np.asarray(jax.jit(_likely)(*map(jnp.asarray, (logits, top_k, top_p, min_p)))))
    for row, options in enumerate(rows):
        np.testing.assert_array_equal(kept[row], expected_limits(logits[row], *options), f"{options}")


@pytest.mark.parametrize("option", [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_draws_follow_from_seed_prompt_and_position_alone(rng, option):
    """Whatever JAX draws with by default, they are what its documented default draws, in any row."""
    seed, prompt, position = map(jnp.uint32, (7, 3, 100))
    key = functools.reduce(jax.random.fold_in, (3, 100), jax.random.key(7, impl="threefry2x32"))
    np.testing.assert_array_equal(_gumbel(seed, prompt, position, 50), jax.random.gumbel(key, (50,)))
    row = rng.standard_normal(50).astype(np.float32)
    name, value = option
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        tokens = set()
        for at in range(3):
            seeds, positions = np.zeros(3, np.uint32), np.zeros(3, np.int32)
            seeds[at], positions[at] = 7, 100
            draws = Draws(np.ones(3, np.float32), seeds, np.full(3, 3, np.int32))
            tokens.add(int(jax.jit(choose_tokens)(jnp.tile(row, (3, 1)), positions, draws)[at]))
    finally:
        jax.config.update(name, before)
    assert tokens == {int(jax.random.categorical(key, row - row.max()))}


def test_limits_of_one_request_beside_others(model, alone):
    limited = with_options(REQUEST, top_k=3, top_p=0.9, min_p=0.01)
    best = with_options(REQUEST, top_k=1)
    loop = make_loop(model, **ALL)
    events = []
    tokens, _ = run(loop, REQUEST, limited, best, on_event=events.append)
    assert tokens[0, 0] == alone(REQUEST)
    assert tokens[2, 0] == alone(dataclasses.replace(REQUEST, options=()))
    ranks = [
        int((row > row[token]).sum())
        for event in events
        if event.request == 1 and event.tokens
        for row, token in zip(event.logits, event.tokens, strict=True)
    ]
    assert 0 < max(ranks) < 3


def test_log_probabilities(model):
    loop = make_loop(model, **ALL)
    events = []
    run(loop, REQUEST, on_event=events.append)
    for event in events:
        if event.tokens:
            every = np.asarray(jax.nn.log_softmax(event.logits, axis=-1))
            probs = event.log_probs
            np.testing.assert_allclose(probs.chosen, every[np.arange(len(every)), event.tokens], rtol=1e-6)
            np.testing.assert_allclose(probs.best, np.sort(every)[:, :-3:-1], rtol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(every, probs.best_tokens, 1), probs.best, rtol=1e-6)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_hook_that_forbids_what_was_there(model, drafts):
    """Through chunks, decode calls and drafts: no token of 20 and above comes twice where it is so submitted."""
    loop = make_loop(model, draft_tokens=drafts, max_rollback=drafts, **ALL)
    free, bound = ask(3, 49), with_options(ask(3, 30), hook_argument=20)
    tokens, _ = run(loop, free, bound)
    mine = [*bound.prompt, *tokens[1, 0]]
    late = [t for t in mine if t >= 20]
    assert len(late) == len(set(late)) > 3
    assert max(tokens[0, 0].count(t) for t in tokens[0, 0]) > 1


def test_stop_texts_end_a_sample(model, alone):
    request = ask(10, 52)
    tokens = alone(request)
    spelled = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"

    def decode(ids):
        return "".join(spelled[i] for i in ids)

    stop = decode(tokens[6:8])
    end = decode(tokens).index(stop) + 2
    loop = make_loop(model)
    got, ends = run(loop, with_options(request, stop_texts=(stop, "never"), decode=decode), request)
    assert got == {(0, 0): tokens[:end], (1, 0): tokens}
    assert ends[0, 0] == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0: expected a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"stop_texts": ["x"]}, "stop_texts need `decode`"),
        ({"stop_texts": [""]}, "expected texts of one character or more"),
    ],
)
def test_options_that_make_no_sense(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_loop(model).submit([1], 4, **options)


def test_a_request_goes_on_in_another_loop(model, alone):
    """Taken out while it waits, is read and decodes, and adopted beside another; the first goes on too."""
    request = Ask(ask(20, 60).prompt, 40, (("temperature", 1.0), ("seed", 3), ("num_samples", 2)))
    expected = [
        alone(with_options(dataclasses.replace(request, options=request.options[:1]), seed=3 + j)) for j in (0, 1)
    ]
    loop, tokens = make_loop(model), {0: [], 1: []}
    number = request.submit(loop)
    snapshots = []
    for _ in range(7):
        snapshots.append((loop.snapshot(number), {j: list(t) for j, t in tokens.items()}))
        for event in loop.step():
            tokens[event.sample] += event.tokens
    for event in loop:
        tokens[event.sample] += event.tokens
    assert [tokens[0], tokens[1]] == expected
    for snapshot, had in snapshots:
        other = make_loop(model, TIGHT)
        ask(5, 50, start=2).submit(other)
        mine = other.adopt(snapshot)
        for event in other:
            if event.request == mine:
                had[event.sample] = had[event.sample] + event.tokens
        assert [had[0], had[1]] == expected
    assert snapshots[-1][0].nbytes > 0
    with pytest.raises(ValueError, match=r"expected what DecodeLoop\.snapshot returns"):
        loop.adopt(None)
