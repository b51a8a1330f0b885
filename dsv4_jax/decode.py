"""Prefill and the jit-compiled decode loop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .cache.kv_cache import KVCache
from .cache.manager import KVCacheManager
from .cache.plan import StepPlan
from .cache.schema import compute_block_budget
from .model.layer_schedule import build_schedule
from .model.transformer import DSV4Model

Array = jax.Array

PREFILL_CHUNK = 128
"""Tokens of a prompt that one prefill step takes."""

DECODE_STEPS = 16
"""Decode steps in one jitted call."""


class Sampling(NamedTuple):
    """How a token is chosen from its logits."""

    temperature: Array | np.floating  # () float32, 0 is greedy
    seed: Array | np.unsignedinteger  # () uint32
    stop_tokens: Array | np.ndarray  # (n,) int32, after which a request ends


class LoopState(NamedTuple):
    """Where each of the B requests stands; request b has slot b."""

    tokens: Array  # (B,) int32, the newest token, not in the cache yet
    positions: Array  # (B,) int32, its position
    remaining: Array  # (B,) int32, tokens still to come after it


def choose_tokens(logits: Array, requests: Array, positions: Array, sampling: Sampling, greedy: bool) -> Array:
    """Tokens (B,) int32 from logits (B, V): the best, or drawn at sampling.temperature.

    The random numbers of a draw follow from (seed, request, position) alone, not from the batch around it.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row: Array, request: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), request), position)
        return jax.random.categorical(key, row / sampling.temperature)

    return jax.vmap(draw)(logits, requests, positions).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef", "greedy"), donate_argnames="cache")
def prefill_step(
    graphdef: Any,
    weights: Any,
    cache: KVCache,
    plan: StepPlan,
    token_ids: Array,
    rows: Array,
    sampling: Sampling,
    greedy: bool,
) -> tuple[Array, Array, KVCache]:
    """One chunk of every prompt; rows (B,) are the tokens whose logits count.

    Returns the tokens (B,) chosen there, their logits (B, V) float32, and the cache.
    """
    model = nnx.merge(graphdef, weights)
    hidden, cache = model.hidden(token_ids, cache, plan)
    logits = model.logits(hidden[rows])
    requests = jnp.arange(rows.shape[0], dtype=jnp.int32)
    chosen = choose_tokens(logits, requests, jnp.asarray(plan.positions)[rows], sampling, greedy)
    return chosen, logits, cache


@partial(
    jax.jit,
    static_argnames=("graphdef", "steps", "greedy", "return_logits"),
    donate_argnames=("cache", "loop"),
)
def decode_steps(
    graphdef: Any,
    weights: Any,
    cache: KVCache,
    loop: LoopState,
    new_blocks: dict[str, Array],
    sampling: Sampling,
    *,
    steps: int,
    greedy: bool,
    return_logits: bool,
) -> tuple[Array, Array | None, LoopState, KVCache]:
    """`steps` decode steps in one call. A request with nothing remaining is padding and writes nothing.

    Returns the tokens (steps, B) chosen (-1 for padding), their logits (steps, B, V) or None, the state and the cache.
    """
    model = nnx.merge(graphdef, weights)
    requests = jnp.arange(loop.tokens.shape[0], dtype=jnp.int32)

    def step(carry: tuple[KVCache, LoopState], _: None):
        cache, loop = carry
        live = loop.remaining > 0
        plan = StepPlan(jnp.where(live, requests, -1), loop.positions)
        logits, cache = model(loop.tokens, cache, plan)
        chosen = choose_tokens(logits, requests, loop.positions, sampling, greedy)
        stops = jnp.any(chosen[:, None] == sampling.stop_tokens[None], axis=-1)
        loop = LoopState(
            tokens=jnp.where(live, chosen, loop.tokens),
            positions=jnp.where(live, loop.positions + 1, loop.positions),
            remaining=jnp.where(live & ~stops, loop.remaining - 1, 0),
        )
        return (cache, loop), (jnp.where(live, chosen, -1), logits if return_logits else None)

    (cache, loop), (tokens, logits) = jax.lax.scan(step, (cache.with_blocks(new_blocks), loop), length=steps)
    return tokens, logits, loop, cache


@dataclass(frozen=True)
class Chunk:
    """What one call of the loop brought: per request its new tokens, and their logits (n, V) where asked for."""

    tokens: list[list[int]]
    logits: list[np.ndarray] | None
    cache_bytes: int
    prompt_tokens: int = 0  # prompt tokens that this call prefilled


def _check_prompts(model: DSV4Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[np.ndarray]:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    vocab, longest = model.config.vocab_size, model.config.max_position_embeddings
    checked = []
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"prompt {i} is {str(prompt)[:60]!r}: expected a list of one or more token ids")
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"prompt {i} has token ids from {ids.min()} to {ids.max()}: expected 0 to {vocab - 1}")
        if len(ids) + max_new_tokens > longest:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and {max_new_tokens} shall follow: the model has {longest} positions"
            )
        checked.append(ids.astype(np.int32))
    return checked


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def make_manager(
    model: DSV4Model,
    max_concurrent_requests: int,
    max_context_len: int,
    **options: Any,
) -> KVCacheManager:
    """A manager with blocks for that many requests of that many tokens; options as for KVCacheManager."""
    schedule = build_schedule(model.config)
    budget = compute_block_budget(model.config, schedule, max_context_len, max_concurrent_requests)
    return KVCacheManager(
        model.config,
        schedule,
        max_concurrent_requests=max_concurrent_requests,
        num_blocks_per_csa_layer=budget["csa"],
        num_blocks_per_hca_layer=budget["hca"],
        max_context_len=max_context_len,
        **options,
    )


def _prefill_plan(
    manager: KVCacheManager, prompts: list[np.ndarray], start: int, width: int
) -> tuple[StepPlan, np.ndarray, np.ndarray]:
    """Plan, token ids and the row of each prompt's last token in the chunk that begins at `start`."""
    batch = len(prompts)
    ids = np.zeros((batch, width), np.int32)
    slots = np.full((batch, width), -1, np.int32)
    for b, prompt in enumerate(prompts):
        part = prompt[start : start + width]
        ids[b, : len(part)], slots[b, : len(part)] = part, b
    positions = np.broadcast_to(start + np.arange(width, dtype=np.int32), slots.shape)
    plan = manager.plan_step(slots.reshape(-1), positions.reshape(-1), num_segments=batch, width=width)
    last = np.array([np.clip(len(p) - 1 - start, 0, width - 1) for p in prompts], np.int32)
    return plan, ids.reshape(-1), np.arange(batch, dtype=np.int32) * width + last


def stream(
    model: DSV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache_dtype: str = "fp8",
    indexer_dtype: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    return_logits: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    decode_chunk: int = DECODE_STEPS,
) -> Iterator[Chunk]:
    """As `generate`, but yields what every jitted call brings: one `Chunk` per prefill step, then per decode call."""
    ids = _check_prompts(model, prompts, max_new_tokens)
    if temperature < 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature is {temperature}: expected 0 (greedy) or a positive number")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}: expected 0 to {(1 << 32) - 1}")
    if any(not 0 <= t < model.config.vocab_size for t in stop_tokens):
        raise ValueError(f"stop_tokens are {list(stop_tokens)}: expected 0 to {model.config.vocab_size - 1}")
    if prefill_chunk < 1 or decode_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}, decode_chunk is {decode_chunk}: expected 1 or more")
    if not ids or not max_new_tokens:
        return
    batch, longest = len(ids), max(len(p) for p in ids)
    # Sizes in powers of two, so that calls of similar sizes share a compiled program.
    block = model.config.block_size
    context = block * _power_of_two(-(-(longest + max_new_tokens) // block))
    width = min(prefill_chunk, _power_of_two(longest))
    manager = make_manager(model, batch, context, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype)
    for _ in ids:
        manager.admit_request()
    graphdef, weights = nnx.split(model)
    greedy = temperature == 0.0
    stops = np.full(_power_of_two(len(stop_tokens)), -1, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    sampling = Sampling(np.float32(temperature), np.uint32(seed), stops)
    cache_bytes = manager.memory_bytes()

    first: np.ndarray = np.zeros(batch, np.int32)
    first_logits: list[Any] = [None] * batch
    for start in range(0, longest, width):
        plan, token_ids, rows = _prefill_plan(manager, ids, start, width)
        chosen, logits, manager.cache = prefill_step(
            graphdef, weights, manager.cache, plan, token_ids, rows, sampling, greedy
        )
        ends = [b for b, p in enumerate(ids) if start < len(p) <= start + width]
        for b in ends:
            first[b] = np.asarray(chosen)[b]
            first_logits[b] = np.asarray(logits)[b : b + 1] if return_logits else None
        yield Chunk([[]] * batch, None, cache_bytes, sum(len(p[start : start + width]) for p in ids))
    yield Chunk([[int(t)] for t in first], first_logits if return_logits else None, cache_bytes)

    lengths = np.array([len(p) for p in ids], np.int32)
    stopped = np.isin(first, stop_tokens) if len(stop_tokens) else np.zeros(batch, bool)
    remaining = np.where(stopped, 0, max_new_tokens - 1).astype(np.int32)
    loop = LoopState(jnp.asarray(first), jnp.asarray(lengths), jnp.asarray(remaining))
    for done in range(0, max_new_tokens - 1, decode_chunk):
        plan = manager.plan_step(np.arange(batch), np.minimum(lengths + done, context - 1), lookahead=decode_chunk)
        tokens, logits, loop, manager.cache = decode_steps(
            graphdef,
            weights,
            manager.cache,
            loop,
            plan.new_blocks,
            sampling,
            steps=decode_chunk,
            greedy=greedy,
            return_logits=return_logits,
        )
        tokens = np.asarray(tokens)
        live = tokens >= 0
        new = [tokens[live[:, b], b].tolist() for b in range(batch)]
        new_logits = [np.asarray(logits)[live[:, b], b] for b in range(batch)] if return_logits else None
        yield Chunk(new, new_logits, cache_bytes)
        if not np.asarray(loop.remaining).any():
            return


def generate(
    model: DSV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache_dtype: str = "fp8",
    indexer_dtype: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    return_logits: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    decode_chunk: int = DECODE_STEPS,
) -> Any:
    """Continues prompts of any lengths together.

    prompts: lists of token ids. cache_dtype: "fp8" | "fp8_ue8m0" | "bf16" | "fp32"; indexer_dtype: "nvfp4" | "mxfp4" |
    "bf16" | "fp32", by default the one that goes with cache_dtype. temperature 0 is greedy; otherwise a draw follows
    from (seed, index of the prompt, position). A request ends after max_new_tokens or after one of stop_tokens, which
    is kept.

    Returns a list of new tokens per prompt; with return_logits also a list of the float32 logits (new tokens,
    vocabulary) that each token was chosen from. Raises ValueError for prompts or options that make no sense.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[np.ndarray]] = [[] for _ in prompts]
    for chunk in stream(
        model,
        prompts,
        max_new_tokens,
        cache_dtype=cache_dtype,
        indexer_dtype=indexer_dtype,
        temperature=temperature,
        seed=seed,
        stop_tokens=stop_tokens,
        return_logits=return_logits,
        prefill_chunk=prefill_chunk,
        decode_chunk=decode_chunk,
    ):
        for b, new in enumerate(chunk.tokens):
            tokens[b].extend(new)
        for b, rows in enumerate(chunk.logits or ()):
            logits[b].append(rows)
    if not return_logits:
        return tokens
    empty = np.zeros((0, model.config.vocab_size), np.float32)
    return tokens, [np.concatenate([empty, *rows]) for rows in logits]
