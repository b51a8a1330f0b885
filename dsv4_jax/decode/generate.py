"""`generate` and `stream`: a batch of prompts through a loop made for it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..cache.cost import cache_cost
from ..cache.counts import count
from ..cache.manager import KVCacheManager
from ..cache.schema import compute_block_budget
from ..cache.sharded_manager import ShardedKVCacheManager
from ..cache.sharding import DATA
from ..model.layer_schedule import build_schedule
from ..model.sharding import check_shards, shard_model
from ..model.transformer import DSV4Model, check_model
from .context import round_up_blocks
from .loop import DECODE_STEPS, PREFILL_CHUNK, DecodeLoop
from .memory import check_memory
from .request import Sampling, Stats, check_prompt, check_prompts
from .sampling import LogitsHook, LogProbs

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """What one call of the loop brought: per sample its new tokens, and their logits (n, V) where asked for.

    The samples of a prompt lie side by side: sample j of prompt i is number i * num_samples + j.
    """

    tokens: list[list[int]]
    logits: list[np.ndarray | None] | None
    cache_bytes: int
    prompt_tokens: int = 0  # prompt tokens that this call prefilled
    stats: Stats = field(default_factory=Stats)  # so far
    log_probs: list[LogProbs | None] | None = None


def make_manager(
    model: DSV4Model,
    max_concurrent_requests: int,
    max_context_len: int,
    **options: Any,
) -> KVCacheManager | ShardedKVCacheManager:
    """A manager with enough blocks for requests of full length.

    For a model over a mesh it is one over the same mesh, whose shards have an equal share of the requests, rounded up.
    Before it allocates more than a quarter of the device's memory, or for more tokens than the model has positions, it
    logs a warning that says how much.

    Args:
      model: from `from_pretrained` or `random_model`.
      max_concurrent_requests: slots.
      max_context_len: tokens of one request at most.
      **options: cache_dtype, indexer_dtype, max_rollback, debug_nan, fingerprint, hca_tail and prefix, as for
        `KVCacheManager`.

    Returns:
      A KVCacheManager, or a ShardedKVCacheManager where the model lies on a mesh.

    Raises:
      ValueError: the cache is larger than the memory, which is known before anything is allocated, or this is no model.
    """
    check_model(model)
    positions = model.config.max_position_embeddings
    if max_context_len > positions:
        _LOG.warning(
            "a cache of %s tokens a request: the model was made for %s", f"{max_context_len:,}", f"{positions:,}"
        )
    return _make_manager(model, max_concurrent_requests, max_context_len, **options)


def _make_manager(
    model: DSV4Model, max_concurrent_requests: int, max_context_len: int, **options: Any
) -> KVCacheManager | ShardedKVCacheManager:
    schedule = build_schedule(model.config)
    sizing = {"cache_dtype", "indexer_dtype", "max_rollback", "hca_tail"} & options.keys()
    cost = cache_cost(model.config, schedule, **{name: options[name] for name in sizing})
    shards = 1 if model.mesh is None else model.mesh.shape[DATA]
    slots = -(-count("max_concurrent_requests", max_concurrent_requests, least=1, most=2**31 - 1) // shards)
    size = cost.size(slots, max_context_len)
    devices = 1 if model.mesh is None else len(model.mesh.local_devices)
    check_memory(size.total_bytes, f"{slots} requests of {max_context_len:,} tokens", devices)
    budget = compute_block_budget(model.config, schedule, max_context_len, slots)
    options = {
        "max_concurrent_requests": slots,
        "num_blocks_per_csa_layer": budget["csa"],
        "num_blocks_per_hca_layer": budget["hca"],
        "max_context_len": max_context_len,
        **options,
    }
    if model.mesh is not None:
        return ShardedKVCacheManager(model.config, schedule, mesh=model.mesh, **options)
    return KVCacheManager(model.config, schedule, **options)


def stream(
    model: DSV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache_dtype: str = "fp8",
    indexer_dtype: str | None = None,
    hca_tail: str = "full",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_tokens: Iterable[int] = (),
    stop_texts: Iterable[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    num_samples: int = 1,
    draft_tokens: int = 0,
    return_logits: bool = False,
    log_probs: int | None = None,
    logits_hook: LogitsHook | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    decode_chunk: int = DECODE_STEPS,
    mesh: Any = None,
) -> Iterator[Chunk]:
    """As `generate`, but yields the result of every jitted call, one `Chunk` each. Errors come at once."""
    check_model(model)
    max_new_tokens = count("max_new_tokens", max_new_tokens)
    prompts = check_prompts(prompts)
    ids = [check_prompt(model.config, p, max_new_tokens, f"prompt {i}") for i, p in enumerate(prompts)]
    sampling = Sampling(temperature, seed, stop_tokens, num_samples, top_k, top_p, min_p, stop_texts, decode)
    options = sampling.checked(model.config)
    prefill_chunk = count("prefill_chunk", prefill_chunk, least=1)
    decode_chunk = count("decode_chunk", decode_chunk, least=1)
    draft_tokens = count("draft_tokens", draft_tokens)
    if mesh is not None:
        mesh = check_shards(model.config, mesh)
        if model.mesh not in (None, mesh):
            raise ValueError("the model lies on another mesh: expected the one it was spread over, or none")
    if not ids or not max_new_tokens:
        return iter(())
    # More could never be verified.
    draft_tokens = min(draft_tokens, max_new_tokens - 1)
    # Sizes in coarse steps, so that calls of similar sizes share a compiled program.
    longest = max(map(len, ids))
    block = model.config.block_size
    context = block * round_up_blocks(longest + max_new_tokens, block)
    width = min(prefill_chunk, 1 << (longest - 1).bit_length())
    if mesh is not None and model.mesh is None:
        model = shard_model(model, mesh)
    if model.mesh is not None and model.mesh.is_multi_process:
        raise ValueError("the mesh has devices of several processes: expected one process, or a DecodeLoop in each")
    shards = 1 if model.mesh is None else model.mesh.shape[DATA]
    prompts_a_shard = -(-len(ids) // shards)  # a prompt's samples stay together
    slots, rows = prompts_a_shard * num_samples, len(ids) * num_samples
    manager = _make_manager(
        model, slots * shards, context, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype, hca_tail=hca_tail,
        max_rollback=draft_tokens,
    )  # fmt: skip
    loop = DecodeLoop(
        model, manager, prefill_chunk=width, step_tokens=max(prompts_a_shard * width, slots), decode_chunk=decode_chunk,
        draft_tokens=draft_tokens, return_logits=return_logits, log_probs=log_probs, logits_hook=logits_hook,
    )  # fmt: skip
    for i, prompt in enumerate(ids):
        loop.submit(prompt, max_new_tokens, index=i, **options)
    return _chunks(loop, rows, num_samples)


def _chunks(loop: DecodeLoop, rows: int, num_samples: int) -> Iterator[Chunk]:
    """The result of every call of the loop, by row."""
    cache_bytes = loop.manager.memory_bytes()
    compiling = loop.compile_decode()  # beside the prompts' program, so that tokens flow once they begin
    while loop.unfinished:
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logits: list[np.ndarray | None] = [None] * rows
        probs: list[LogProbs | None] = [None] * rows
        events = loop.step()
        for event in events:
            row = event.request * num_samples + event.sample
            tokens[row], logits[row], probs[row] = event.tokens, event.logits, event.log_probs
        if compiling is not None and any(tokens):
            compiling.join()
        prompt_tokens = sum(event.prompt_tokens for event in events)
        yield Chunk(
            tokens, logits if loop.return_logits else None, cache_bytes, prompt_tokens, replace(loop.stats), probs
        )


def generate(
    model: DSV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    return_logits: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Continues prompts of any lengths together.

    The prompts are read side by side, so none continues from another's blocks: where many begin alike, use a
    `DecodeLoop` whose manager has a prefix policy.

    Args:
      model: from `from_pretrained`.
      prompts: lists of token ids.
      max_new_tokens: of each prompt; one ends earlier after one of `stop_tokens` (ids) or with the token that completes
        one of `stop_texts`, which is kept. `decode` turns ids into text for that where tokens are not bytes.
      return_logits: return the logits that each token was chosen from.
      return_stats: return `Stats`.
      **options: cache_dtype "fp8" | "fp8_ue8m0" | "bf16" | "fp32"; indexer_dtype "nvfp4" | "mxfp4" | "bf16" | "fp32",
        by default the one that goes with cache_dtype; hca_tail "full" | "running" (see `build_schema`). temperature 0
        is greedy; otherwise a draw follows from (seed, index of the prompt, position), from the tokens that top_k,
        top_p and min_p leave (see `DecodeLoop.submit`). num_samples: continuations of each prompt, which is prefilled
        once; sample j draws with seed + j. draft_tokens: drafts looked up in the text so far, verified that many at
        once, in fewer calls where a text repeats itself: the same tokens with exact caches; with quantised ones a
        near tie may go the other way, because the step has another shape. log_probs, logits_hook: see `DecodeLoop`;
        `stream` yields log-probabilities. prefill_chunk, decode_chunk: tokens of a prompt in one step, decode steps in
        one call. mesh: a `jax.sharding.Mesh` with an axis "data", over whose devices the prompts and the experts are
        spread; not needed for a model that lies on one.

    Returns:
      A list of new tokens per prompt (num_samples > 1: per sample, those of a prompt side by side); with return_logits
      also a list of float32 logits (new tokens, vocabulary); with return_stats also `Stats`.

    Raises:
      ValueError: prompts or options that make no sense.
    """
    prompts = check_prompts(prompts)
    chunks = stream(model, prompts, max_new_tokens, return_logits=return_logits, **options)
    num = len(prompts) * options.get("num_samples", 1)
    tokens: list[list[int]] = [[] for _ in range(num)]
    logits: list[list[np.ndarray]] = [[] for _ in range(num)]
    stats = Stats()
    for chunk in chunks:
        stats = chunk.stats
        for row, new in enumerate(chunk.tokens):
            tokens[row].extend(new)
        for row, new_logits in enumerate(chunk.logits or ()):
            logits[row] += [] if new_logits is None else [new_logits]
    empty = np.zeros((0, model.config.vocab_size), np.float32)
    results: list[Any] = [tokens]
    if return_logits:
        results.append([np.concatenate([empty, *parts]) for parts in logits])
    if return_stats:
        results.append(stats)
    return results[0] if len(results) == 1 else tuple(results)
