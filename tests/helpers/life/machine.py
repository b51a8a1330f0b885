"""The moves of a session in any order, drawn by hypothesis, which shortens what fails."""

import sys
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from life.session import Session
from life.worlds import World, small

from dsv4_jax.cache.host.prefix import PrefixPolicy

SLOTS, WIDTH, ROLLBACK = 4, small().width, small().max_rollback
WHICH, SEED = st.integers(0, SLOTS - 1), st.integers(0, 2**16 - 1)
COUNTS, WHO = st.tuples(*[st.integers(0, WIDTH)] * SLOTS), st.tuples(*[st.booleans()] * SLOTS)
SOMEBODY = precondition(lambda self: self.session.lengths)


class Life(RuleBasedStateMachine):
    """One session; `world` is set by a subclass."""

    world: World
    moves = hits = 0  # of all sessions of the class
    session: Session | None = None

    @initialize(policy=st.sampled_from(["full", "periodic", "zero"]))
    def begin(self, policy):
        self.session = getattr(self.world, "session_type", Session)(
            self.world, slots=SLOTS, blocks=getattr(self.world, "blocks", 6), prefix=PrefixPolicy(policy, period=24)
        )
        self.session.admit(0)
        self.session.admit(1)

    @rule(seed=SEED)
    def admit(self, seed):
        self.session.admit(seed)

    @SOMEBODY
    @rule(which=WHICH)
    def release(self, which):
        self.session.release(which)

    @SOMEBODY
    @rule(counts=COUNTS, seed=SEED)
    def chunk(self, counts, seed):
        self.session.chunk(counts, seed)

    @SOMEBODY
    @rule(seed=SEED)
    def whole_chunk(self, seed):
        self.session.chunk((WIDTH,) * SLOTS, seed)

    @SOMEBODY
    @rule(who=WHO, seed=SEED)
    def decode(self, who, seed):
        self.session.decode(who, seed)

    @SOMEBODY
    @rule(seed=SEED)
    def whole_decode(self, seed):
        self.session.decode((True,) * SLOTS, seed)

    @SOMEBODY
    @rule(counts=COUNTS, which=WHICH, seed=SEED)
    def interrupted(self, counts, which, seed):
        self.session.interrupted(counts, which, seed)

    @SOMEBODY
    @rule(steps=st.integers(1, 6))
    def burst(self, steps):
        self.session.burst(steps)

    @SOMEBODY
    @rule(which=WHICH, n=st.integers(0, ROLLBACK + 1), seed=SEED)
    def rollback(self, which, n, seed):
        self.session.rollback(which, n, seed)

    @SOMEBODY
    @rule(which=WHICH, seed=SEED)
    def fork(self, which, seed):
        self.session.fork(which, seed)

    @SOMEBODY
    @rule(which=WHICH, n=st.integers(1, ROLLBACK), seed=SEED)
    def branch(self, which, n, seed):
        self.session.branch(which, n, seed)

    @SOMEBODY
    @rule(which=WHICH, back=st.integers(0, ROLLBACK + 1), seed=SEED)
    def snapshot(self, which, back, seed):
        self.session.snapshot(which, back, seed)

    @precondition(lambda self: self.session.shelf)
    @rule(which=WHICH, seed=SEED)
    def restore(self, which, seed):
        before = set(self.session.lengths)
        self.session.restore(which, seed)
        for slot in set(self.session.lengths) - before:
            self.session.rollback(sorted(self.session.lengths).index(slot), seed % (ROLLBACK + 2), seed)

    @SOMEBODY
    @rule(which=WHICH)
    def keep(self, which):
        self.session.keep(which)

    @SOMEBODY
    @rule(which=WHICH, change=st.sampled_from([0, 0, 11, 10, 1, 13]), seed=SEED)
    def share(self, which, change, seed):
        self.session.share(which, change, seed)

    @precondition(lambda self: self.session.kept)
    @rule(which=WHICH, length=st.integers(1, 40), change=st.sampled_from([0, 0, 1, 11, 12, 13, 23, 35]), seed=SEED)
    def admit_like(self, which, length, change, seed):
        self.session.admit_like(which, length, change, seed)

    @SOMEBODY
    @rule(which=st.integers(-1, SLOTS - 1), seed=SEED)
    def poison_or_mistake(self, which, seed):
        if which < 0:
            self.session.poison()
        else:
            self.session.mistake(which, seed)

    @SOMEBODY
    @rule(counts=COUNTS, seed=SEED)
    def not_run(self, counts, seed):
        self.session.not_run(counts, seed)

    @SOMEBODY
    @rule(counts=COUNTS, which=WHICH, seed=SEED)
    def copied(self, counts, which, seed):
        self.session.copied(counts, which, seed)

    @SOMEBODY
    @rule(counts=COUNTS, seed=SEED)
    def two_in_flight(self, counts, seed):
        self.session.two_in_flight(counts, seed)

    @SOMEBODY
    @rule(which=WHICH, at=st.integers(1, 250), seed=SEED)
    def broken_off(self, which, at, seed):
        self.session.broken_off(which, at, seed)

    def teardown(self):
        if self.session is not None and sys.exception() is None:
            self.session.end()
            type(self).moves += self.session.moves
            type(self).hits += self.session.hits


class Played(NamedTuple):
    """What sessions did."""

    moves: int  # that did or refused something
    hits: int  # prompts that went on from kept blocks


def play(world: World, *, examples: int, steps: int, seed: int | None = None) -> Played:
    """Runs `examples` sessions of `steps` moves; without a seed always the same.

    Raises what a move raises, after printing the shortest session that leads there.
    """
    machine = type("Life", (Life,), {"world": world, "moves": 0, "hits": 0})
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    run_state_machine_as_test(machine if seed is None else hypothesis.seed(seed)(machine), settings=settings)
    return Played(machine.moves, machine.hits)
