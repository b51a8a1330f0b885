"""How a token is chosen from its logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

Array = jax.Array


class Draws(NamedTuple):
    """How each of N tokens is drawn."""

    temperature: Array | np.ndarray  # (N,) float32, 0 is greedy
    seed: Array | np.ndarray  # (N,) uint32
    prompt: Array | np.ndarray  # (N,) int32, the index of the prompt
    top_k: Array | np.ndarray | None = None  # (N,) int32, 0 is all; None: no limits at all, here and in the others
    top_p: Array | np.ndarray | None = None  # (N,) float32, 1 is all
    min_p: Array | np.ndarray | None = None  # (N,) float32, 0 is all


@dataclass(frozen=True)
class LogitsHook:
    """Changes logits before a token is chosen from them: masks, grammars, penalties.

    What it knows of a sample is a state, a pytree of arrays of fixed shapes that follows from the sample's tokens. The
    loop asks for it on the host when a sample's place in a jitted call changes, and carries it inside the call from
    token to token. The functions are static arguments of the jitted steps: make a hook once, outside of loops.

    Attributes:
      start: (tokens, argument) -> state, on the host. tokens: ids of a sample so far, prompt included; argument: what
        the request was submitted with as `hook_argument`. `start([], None)` gives a state of the same shapes, for slots
        without a request.
      apply: (state, logits (V,) float32) -> logits (V,) float32, traced; -inf forbids a token.
      advance: (state, token () int32) -> the state after one token more, traced.
    """

    start: Callable[[Sequence[int], Any], Any]
    apply: Callable[[Any, Array], Array]
    advance: Callable[[Any, Array], Any]


class LogProbs(NamedTuple):
    """Natural logarithms of probabilities of n tokens, before temperature and top-k, top-p and min-p."""

    chosen: Any  # (n,) float32
    best_tokens: Any  # (n, k) int32, the most likely first
    best: Any  # (n, k) float32


def log_probs(logits: Array, tokens: Array, num_best: int) -> LogProbs:
    """Log-probabilities of tokens (...,) and of the num_best most likely, from logits (..., V)."""
    every = jax.nn.log_softmax(logits, axis=-1)
    best, best_tokens = jax.lax.top_k(every, num_best)
    chosen = jnp.take_along_axis(every, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return LogProbs(chosen, best_tokens.astype(jnp.int32), best)


def choose_tokens(logits: Array, positions: Array, draws: Draws) -> Array:
    """Tokens (N,) int32 from logits (N, V) of the tokens at positions (N,): the best, or drawn at a temperature.

    The random numbers of a draw follow from (seed, index of the prompt, position) alone: neither from the batch around
    it nor from JAX's default generator, `jax_default_prng_impl`. They are made for greedy rows too (5 µs a step of 16
    rows of 256 on two x86 cores), so that one program serves all.
    """
    temperature, seed, prompt = map(jnp.asarray, draws[:3])
    # The best logit is 0, so that no temperature, however small, makes an infinity of it.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(temperature > 0, temperature, jnp.float32(1))[:, None]
    if draws.top_k is not None:
        top_k, top_p, min_p = map(jnp.asarray, draws[3:])
        limited = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
        scaled = jax.lax.cond(limited, _likely, lambda scaled, *_: scaled, scaled, top_k, top_p, min_p)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(seed, prompt, positions, logits.shape[-1])
    drawn = jnp.argmax(scaled + noise.astype(scaled.dtype), axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _gumbel(seed: Array, prompt: Array, position: Array, size: int) -> Array:
    """Gumbel noise (size,) float32 of one draw: the bits of threefry2x32, as `jax.random` makes them by default.

    Written out because a key of `jax.random` follows options that a user can change (`jax_default_prng_impl`,
    `jax_threefry_partitionable`, `jax_random_seed_offset`).
    """

    def fold(key: Array, number: Array) -> Array:
        return threefry_2x32(key, jnp.stack([jnp.uint32(0), number.astype(jnp.uint32)]))

    key = fold(fold(jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)]), prompt), position)
    counts = jnp.concatenate([jnp.zeros(size, jnp.uint32), jnp.arange(size, dtype=jnp.uint32)])
    high, low = jnp.split(threefry_2x32(key, counts), 2)
    bits = ((high ^ low) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)  # a float in [1, 2)
    tiny = jnp.float32(np.finfo(np.float32).tiny)
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - jnp.float32(1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform * (jnp.float32(1) - tiny) + tiny, tiny)))


def _likely(scaled: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Logits (N, V) with -inf for what top-k, then top-p, then min-p leave out. Equal logits stay or go together."""
    bits = jax.lax.bitcast_convert_type(scaled.astype(jnp.float32), jnp.uint32)
    negative = bits >> jnp.uint32(31) > 0
    order = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))  # integers in the order of the logits

    def threshold(enough: Callable[[Array], Array]) -> Array:
        """(N, 1): the largest integer at or above which there is enough. Bisection needs no sorting."""

        def bit(i: Array, found: Array) -> Array:
            candidate = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
            return jnp.where(enough(order >= candidate[:, None]), candidate, found)

        return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))[:, None]

    most = jnp.where(top_k > 0, top_k, order.shape[-1])
    kept = order >= threshold(lambda above: jnp.sum(above, axis=-1, dtype=jnp.int32) >= most)
    weights = jnp.where(kept, jnp.exp(scaled), jnp.float32(0))
    total = jnp.sum(weights, axis=-1)

    def mass(above: Array) -> Array:
        return jnp.sum(jnp.where(above, weights, jnp.float32(0)), axis=-1) >= top_p * total

    nucleus = order >= jnp.where(top_p < 1, threshold(mass)[:, 0], jnp.uint32(0))[:, None]
    # The best logit is 0, so its weight is 1.
    kept = kept & nucleus & (weights >= min_p[:, None])
    return jnp.where(kept, scaled, -jnp.inf)
