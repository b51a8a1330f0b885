"""A small run of a model that stops after every step, for looking at its cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..cache.occupancy import Occupancy, occupancy
from .state_text import counted

CHUNK = 64
"""Most tokens of a request in one step."""


def small_run(
    model: Any, prompts: Sequence[Sequence[int]], steps: int, cache_dtype: str
) -> Iterator[tuple[str, Occupancy]]:
    """Prefills the prompts one after the other, decodes `steps` tokens of each, forks the first and releases it.

    Yields what happened and the state of the cache after it. Every step is one call of the same compiled program.
    Raises ValueError where a prompt and the steps are more than the model has positions.
    """
    import jax
    from flax import nnx

    from ..cache.manager import KVCacheManager
    from ..decode import make_manager

    requests, longest = len(prompts), max(map(len, prompts))
    width = min(CHUNK, longest)
    if longest + steps > (positions := model.config.max_position_embeddings):
        raise ValueError(f"{longest} tokens and {steps} steps: the model has {positions} positions")
    block = model.config.block_size
    context = -(-(longest + steps + 1) // block) * block
    manager = make_manager(model, requests + 1, context, cache_dtype=cache_dtype)
    assert isinstance(manager, KVCacheManager)  # of a model on one device
    graphdef, weights = nnx.split(model)

    @jax.jit
    def forward(weights: Any, cache: Any, plan: Any, ids: Any, rows: Any) -> tuple[Any, Any]:
        logits, cache = nnx.merge(graphdef, weights)(ids, cache, plan)
        return logits[rows].argmax(axis=-1), cache

    def step(tokens: dict[int, Sequence[int]]) -> dict[int, int]:
        """tokens: slot -> its next tokens -> the token that follows, by slot."""
        ids, slots, positions = (np.full((requests, width), fill, np.int32) for fill in (0, -1, 0))
        rows = np.zeros(requests, np.int32)
        for i, (slot, new) in enumerate(tokens.items()):
            ids[i, : len(new)], slots[i, : len(new)] = new, slot
            positions[i, : len(new)] = manager.length(slot) + np.arange(len(new))
            rows[i] = i * width + len(new) - 1
        plan = manager.plan_step(slots.reshape(-1), positions.reshape(-1), num_segments=requests, width=width)
        chosen, manager.cache = forward(weights, manager.cache, plan, ids.reshape(-1), rows)
        return dict(zip(tokens, np.asarray(chosen).tolist(), strict=False))

    newest: dict[int, int] = {}
    for prompt in prompts:
        slot = manager.admit_request()
        for start in range(0, len(prompt), width):
            newest |= step({slot: prompt[start : start + width]})
        yield f"prefill of {counted(len(prompt), 'token')} in slot {slot}", occupancy(manager)
    for i in range(steps):
        newest = step({slot: [token] for slot, token in newest.items()})
        yield f"decode step {i + 1}: one token in every slot", occupancy(manager)
    first = next(iter(newest))
    second = manager.fork(first)
    yield f"fork of slot {first} into slot {second}", occupancy(manager)
    manager.release_request(first)
    yield f"release of slot {first}", occupancy(manager)
