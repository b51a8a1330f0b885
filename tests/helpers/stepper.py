"""Feeds a model any mix of tokens, step by step, as somebody with a loop of their own would."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv4_jax.decode import make_manager


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def model_step(graphdef, weights, cache, plan, token_ids):
    """One step with the logits of every token."""
    return nnx.merge(graphdef, weights)(token_ids, cache, plan)


class Stepper:
    """A model, its cache and a step of fixed shape: `segments` slots with up to `width` tokens each."""

    def __init__(self, model, slots, *, context=512, cache_dtype="fp32", **options):
        self.graphdef, self.weights = nnx.split(model)
        self.manager = make_manager(model, slots, context, cache_dtype=cache_dtype, **options)

    def step(self, tokens, *, segments, width, pad_first=False):
        """tokens: (slot, position, token id) in any order -> logits (n, V) in that order; the rest is padding."""
        total, n = segments * width, len(tokens)
        place = np.arange(n) + (total - n if pad_first else 0)
        slots, positions, ids = np.full(total, -1, np.int32), np.zeros(total, np.int32), np.zeros(total, np.int32)
        if n:
            slots[place], positions[place], ids[place] = np.array(tokens, np.int32).T
        plan = self.manager.plan_step(slots, positions, num_segments=segments, width=width)
        logits, self.manager.cache = model_step(self.graphdef, self.weights, self.manager.cache, plan, ids)
        return np.asarray(logits)[place]

    def feed(self, slot, ids, cuts, *, width, segments=1, start=0, **options):
        """Feeds ids to one slot in pieces of at most `width` that end at each of `cuts` -> logits (len(ids), V)."""
        logits, at = [], 0
        while at < len(ids):
            end = min([at + width, len(ids), *(c for c in cuts if c > at)])
            tokens = [(slot, start + p, ids[p]) for p in range(at, end)]
            logits.append(self.step(tokens, segments=segments, width=width, **options))
            at = end
        return np.concatenate(logits)
