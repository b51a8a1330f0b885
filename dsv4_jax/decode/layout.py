"""The arrays of a call, from the tokens of each sample."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .request import Sample
from .sampling import Draws, LogitsHook
from .steps import LoopState


class Part(NamedTuple):
    """The part of one sample in a step: the next of its tokens, with drafts after the newest."""

    sample: Sample
    tokens: list[int]
    drafts: int = 0  # how many of the tokens are drafts
    draws: int = 0  # tokens drawn after it: none inside a prompt, one after each draft, one for each sample at a fork

    @property
    def end(self) -> int:
        """Tokens of the sample in the cache after the step."""
        return self.sample.computed + len(self.tokens)

    @property
    def forks(self) -> bool:
        """Whether all is drawn after the last token, for samples that part here."""
        return self.draws > self.drafts + 1


def token_arrays(parts: Iterable[Part], total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, slots and positions (total,) int32 of a step; what is left is padding."""
    ids, slots, positions = np.zeros(total, np.int32), np.full(total, -1, np.int32), np.zeros(total, np.int32)
    at = 0
    for part in parts:
        here = np.s_[at : at + len(part.tokens)]
        ids[here], slots[here] = part.tokens, part.sample.slot
        positions[here] = np.arange(part.sample.computed, part.end)
        at += len(part.tokens)
    return ids, slots, positions


def draw_arrays(parts: Iterable[Part], most: int) -> tuple[np.ndarray, Draws]:
    """The rows (most,) int32 after which a step draws, and how: the draws of each part, in order."""
    rows, draws = np.zeros(most, np.int32), no_draws(most)
    at = drawn = 0
    for part in parts:
        at += len(part.tokens)
        for i in range(part.draws):
            rows[drawn] = at - 1 if part.forks else at - part.draws + i
            _set(draws, drawn, part.sample, part.sample.index + (i if part.forks else 0))
            drawn += 1
    return rows, draws


def row_states(parts: Iterable[Part], most: int, hook: LogitsHook | None) -> Any:
    """The hook's states for the rows of `draw_arrays`, arrays (most, ...); None without a hook."""
    if hook is None:
        return None
    states = []
    for part in parts:
        for i in range(part.draws):
            drafts = [] if part.forks else part.tokens[1 : i + 1]
            states.append(hook.start([*part.sample.ids, *drafts], part.sample.request.hook_argument))
    return _stack(states + [hook.start([], None)] * (most - len(states)))


def _stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *rows: np.stack([np.asarray(row) for row in rows]), *states)


def slot_arrays(
    parts: Sequence[tuple[Sample, int]], num_slots: int, hook: LogitsHook | None = None
) -> tuple[LoopState, Draws]:
    """Where every slot stands (num_slots,), and how it draws. parts: samples, and how many tokens each is to get."""
    state = np.zeros((3, num_slots), np.int32)
    draws = no_draws(num_slots)
    states = [] if hook is None else [hook.start([], None)] * num_slots
    for sample, remaining in parts:
        state[:, sample.slot] = sample.ids[-1], sample.computed, remaining
        _set(draws, sample.slot, sample, sample.index)
        if hook is not None:
            states[sample.slot] = hook.start(list(sample.ids), sample.request.hook_argument)
    tokens, positions, to_come = state
    return LoopState(tokens, positions, to_come, _stack(states) if states else None), draws


def no_draws(size: int) -> Draws:
    """Greedy rows."""
    zeros, ones = np.zeros(size, np.float32), np.ones(size, np.float32)
    return Draws(
        zeros, np.zeros(size, np.uint32), np.zeros(size, np.int32), np.zeros(size, np.int32), ones, zeros.copy()
    )


def _set(draws: Draws, row: int, sample: Sample, index: int) -> None:
    request = sample.request
    draws.temperature[row] = request.temperature
    draws.seed[row] = (request.seed + index) % (1 << 32)
    draws.prompt[row] = request.index
    for name in ("top_k", "top_p", "min_p"):
        getattr(draws, name)[row] = getattr(request, name)
