"""What a session's steps compute, and what they must have computed."""

import operator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from flax import nnx
from life.fill import Fill, empty_cache
from small_model import SMALL
from stepper import model_step

from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.model.transformer import DSV4Model

if TYPE_CHECKING:
    from life.session import Session


@cache
def small(cache_dtype: str = "fp8", **options: Any) -> Fill:
    """The small geometry, of which a session of random moves sees every edge."""
    config = SMALL.replace(num_hidden_layers=4, compress_ratios=(0, 4, 6, 4))
    return Fill(config, length=40, width=15, max_rollback=5, cache_dtype=cache_dtype, **options)


class World(Protocol):
    """Steps over a cache, and their reference: recomputed from a text alone."""

    fill: Fill  # the geometry
    reach: int | None  # tokens that the policy "zero" must compute again; None: as many as a model's layers need

    def renew(self, session: "Session", slot: int) -> None:
        """Recomputes what the text of a slot gives, from nothing."""

    def step(self, session: "Session", plan: StepPlan) -> None:
        """Runs the step on the session's cache and compares."""

    def check(self, session: "Session") -> None:
        """Compares what can be seen without a step."""


def _tokens(session: "Session", plan: StepPlan) -> np.ndarray:
    return np.where(plan.slots >= 0, session.texts[plan.slots, plan.positions], 0)


def on_host(plan: StepPlan) -> StepPlan:
    """The tokens of a plan that may lie on the device."""
    return jax.tree.map(np.asarray, StepPlan(plan.slots, plan.positions, plan.grouped))


def unlike_before(session: "Session", plan: StepPlan) -> np.ndarray:
    """(T,) bool: tokens that a prefix hit computes again, without the state that they had the first time."""
    ends = np.array([session.complete.get(slot, 0) for slot in range(session.slots)])
    return (plan.slots >= 0) & (plan.positions < ends[plan.slots])


def _renew(session: "Session", slot: int, one: Any) -> None:
    if session.expected is None:
        session.expected = jax.tree.map(lambda x: np.repeat(x, session.slots, axis=0), one)
    for rows, row in zip(jax.tree.leaves(session.expected), jax.tree.leaves(one), strict=True):
        rows[slot] = row[0]
    session.looked_at = None


def is_news(session: "Session", slots: np.ndarray, positions: np.ndarray) -> bool:
    """Whether a look at the cache can show anything else than the last one: the same arrays show the same."""
    last, arrays = session.looked_at, jax.tree.leaves(session.manager.cache)
    session.looked_at = arrays, slots.tolist(), positions.tolist()
    return last is None or last[1:] != session.looked_at[1:] or any(map(operator.is_not, last[0], arrays))


class Views:
    """Without a model: the views that a model would attend to, bit for bit, after every move."""

    reach = 8  # layers know nothing of each other: a window less one, or the window before the next entry's

    def __init__(self, fill: Fill):
        self.fill = fill

    def renew(self, session: "Session", slot: int) -> None:
        _renew(session, slot, self.fill.recompute(session.texts[slot : slot + 1]))

    def step(self, session: "Session", plan: StepPlan) -> None:
        host_plan = on_host(plan)
        session.manager.cache, seen = self.fill.step(session.manager.cache, plan, _tokens(session, host_plan))
        self.fill.compare(seen, session.expected, host_plan, unlike_before(session, host_plan))

    def check(self, session: "Session") -> None:
        slots, positions = np.full(session.slots, -1, np.int32), np.zeros(session.slots, np.int32)
        for slot, n in session.lengths.items():
            # A snapshot holds what the next token sees, not what the newest one saw.
            if n > session.complete.get(slot, 0) and n != session.restored.get(slot):
                slots[slot], positions[slot] = slot, n - 1
        if session.expected is not None and is_news(session, slots, positions):
            plan = StepPlan(slots, positions)
            unlike = np.zeros(len(slots), bool)
            self.fill.compare(self.fill.look(session.manager.cache, plan), session.expected, plan, unlike)


@partial(jax.jit, static_argnames=("graphdef", "fill"))
def _logits(graphdef: Any, weights: Any, fill: Fill, tokens: jax.Array) -> jax.Array:
    """Logits (1, length, V) of one text over a cache that holds nothing."""
    cache, plan = empty_cache(fill.config, 1, fill.length, **fill.options)
    return nnx.merge(graphdef, weights)(tokens, cache, plan)[0][None]


class Model:
    """A random model of every kind of layer, in float32: the logits of every token of a step."""

    reach = None

    def __init__(self) -> None:
        self.fill = Fill(SMALL, length=40, width=15, max_rollback=5, cache_dtype="fp32")
        self.graphdef, self.weights = nnx.split(DSV4Model(self.fill.config, rngs=nnx.Rngs(2)))

    def renew(self, session: "Session", slot: int) -> None:
        _renew(session, slot, np.asarray(_logits(self.graphdef, self.weights, self.fill, session.texts[slot])))

    def step(self, session: "Session", plan: StepPlan) -> None:
        host_plan = on_host(plan)
        logits, session.manager.cache = model_step(
            self.graphdef, self.weights, session.manager.cache, plan, _tokens(session, host_plan)
        )
        plan = host_plan
        live = (plan.slots >= 0) & ~unlike_before(session, plan)
        want = session.expected[plan.slots[live], plan.positions[live]]
        np.testing.assert_allclose(np.asarray(logits)[live], want, rtol=0, atol=5e-5)

    def check(self, session: "Session") -> None:
        pass
