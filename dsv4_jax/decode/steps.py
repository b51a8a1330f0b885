"""The jitted steps of a decode loop: fixed shapes, the cache donated, nothing of the host inside.

They return lists of arrays, which `Wanted.chosen` and `jax.tree.unflatten` turn into what they are. To build a named
tuple or a dataclass, jit runs Python code once the donated cache is gone: a Ctrl-C that Python hears there would take
the results with it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..cache.kv_cache import KVCache
from ..cache.plan import StepPlan
from ..model.transformer import DSV4Model
from .sampling import Draws, LogitsHook, LogProbs, choose_tokens, log_probs

Array = jax.Array


class Structure:
    """A model without its arrays, as a static argument of jit: hashed once, compared by identity first."""

    def __init__(self, graphdef: nnx.GraphDef, treedef: jax.tree_util.PyTreeDef):
        self._parts = graphdef, treedef
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._parts == other._parts)

    def model(self, weights: list[Array]) -> DSV4Model:
        """The model with these arrays."""
        graphdef, treedef = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


_structures: dict[Structure, Structure] = {}


def split_model(model: DSV4Model) -> tuple[Structure, list[Array]]:
    """The static part of a model, one object for all models of one structure, and its arrays as a plain list.

    A call of a jitted function costs 0.1 ms with these and 3 ms with what nnx.split gives (212 arrays, two x86 cores).
    """
    graphdef, state = nnx.split(model)
    weights, treedef = jax.tree.flatten(state)
    structure = Structure(graphdef, treedef)
    return _structures.setdefault(structure, structure), weights


class LoopState(NamedTuple):
    """Where each of the R slots stands between decode calls."""

    tokens: Any  # (R,) int32, the newest token, not in the cache yet
    positions: Any  # (R,) int32, its position
    remaining: Any  # (R,) int32, tokens still to come after it; 0 for a slot that does not decode
    hook: Any = None  # the logits hook's states, arrays (R, ...)


class Chosen(NamedTuple):
    """What a call draws; leading sizes are those of the tokens."""

    tokens: Array  # int32, -1 for padding
    logits: Array | None  # (..., V) float32, after the hook, where asked for
    log_probs: LogProbs | None  # where asked for


class Wanted(NamedTuple):
    """What a call returns beside the tokens, and the hook on its logits. Static."""

    logits: bool = False
    log_probs: int | None = None  # how many of the best tokens; None: no log-probabilities
    hook: LogitsHook | None = None

    def chosen(self, arrays: list[Any]) -> "Chosen":
        """What a call drew, from the leaves it returned."""
        tokens, *rest = arrays
        logits = rest.pop(0) if self.logits else None
        return Chosen(tokens, logits, LogProbs(*rest) if rest else None)


TOKENS, WITH_LOGITS = Wanted(), Wanted(logits=True)


class PrefillInputs(NamedTuple):
    """What a prefill step computes, of T tokens, and where it draws one, N times."""

    token_ids: Any  # (T,) int32, laid out as the plan
    rows: Any  # (N,) int32, the tokens after which one is drawn, in any order and as often as is wanted
    draws: Draws  # how, a row for each
    hook_states: Any = None  # states of the logits hook, arrays (N, ...)


class DecodeInputs(NamedTuple):
    """What decode steps are given beside the state of the slots."""

    new_blocks: Any  # as in a StepPlan
    draws: Draws  # how each slot draws


class DecodeProgram(NamedTuple):
    """What is fixed in a program of decode steps. Static."""

    steps: int
    max_blocks: int | None  # as in a StepPlan
    wanted: Wanted = TOKENS


def _choose(wanted: Wanted, state: Any, logits: Array, positions: Array, draws: Draws) -> Chosen:
    if wanted.hook is not None:
        logits = jax.vmap(wanted.hook.apply)(state, logits)
    tokens = choose_tokens(logits, positions, draws)
    probs = None if wanted.log_probs is None else log_probs(logits, tokens, wanted.log_probs)
    return Chosen(tokens, logits if wanted.logits else None, probs)


@partial(jax.jit, static_argnames=("structure", "wanted"), donate_argnames="cache")
def prefill_step(
    structure: Structure,
    weights: list[Array],
    cache: KVCache,
    plan: StepPlan,
    given: PrefillInputs,
    *,
    wanted: Wanted = WITH_LOGITS,
) -> tuple[list[Array], list[Array]]:
    """One step of any mix of tokens: chunks of prompts, decode tokens, drafts to verify.

    Args:
      structure, weights: the model, from `split_model`.
      cache: donated.
      plan: the step's plan, over T tokens.
      given: the tokens, and where to draw.
      wanted: static; what is returned beside the tokens.

    Returns:
      The leaves of what was drawn, a Chosen (N, ...), and those of the cache.
    """
    model = structure.model(weights)
    hidden, cache = model.hidden(given.token_ids, cache, plan)
    logits = model.logits(hidden[given.rows])
    chosen = _choose(wanted, given.hook_states, logits, jnp.asarray(plan.positions)[given.rows], given.draws)
    return jax.tree.leaves(chosen), jax.tree.leaves(cache)


@partial(jax.jit, static_argnames=("structure", "program"), donate_argnames="cache")
def decode_steps(
    structure: Structure,
    weights: list[Array],
    cache: KVCache,
    loop: LoopState,
    given: DecodeInputs,
    *,
    program: DecodeProgram,
) -> tuple[list[Array], list[Array], list[Array]]:
    """Decode steps in one call. A slot with nothing remaining is padding and writes nothing.

    Args:
      structure, weights, cache: as in `prefill_step`.
      loop: where each of the R slots stands.
      given: blocks, and how to draw.
      program: static; how many steps, and what is returned beside the tokens.

    Returns:
      The leaves of what was drawn, a Chosen (steps, R, ...) with tokens -1 for padding, of the slots' state and of the
      cache.
    """
    model, wanted = structure.model(weights), program.wanted
    slots = jnp.arange(loop.tokens.shape[0], dtype=jnp.int32)

    def step(carry: tuple[KVCache, LoopState], _: None):
        cache, loop = carry
        live = loop.remaining > 0
        plan = StepPlan(jnp.where(live, slots, -1), loop.positions, max_blocks=program.max_blocks)
        logits, cache = model(loop.tokens, cache, plan)
        chosen = _choose(wanted, loop.hook, logits, loop.positions, given.draws)
        loop = LoopState(
            tokens=jnp.where(live, chosen.tokens, loop.tokens),
            positions=jnp.where(live, loop.positions + 1, loop.positions),
            remaining=jnp.where(live, loop.remaining - 1, 0),
            hook=None if wanted.hook is None else jax.vmap(wanted.hook.advance)(loop.hook, chosen.tokens),
        )
        return (cache, loop), chosen._replace(tokens=jnp.where(live, chosen.tokens, -1))

    (cache, loop), chosen = jax.lax.scan(step, (cache.with_blocks(given.new_blocks), loop), length=program.steps)
    return jax.tree.leaves(chosen), jax.tree.leaves(loop), jax.tree.leaves(cache)
