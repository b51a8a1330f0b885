"""What a decode loop is asked for, and what it answers."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cache.counts import count
from ..cache.transfer.snapshot import Snapshot
from ..model.config import DSV4Config
from .draft import PromptLookup

MAX_SAMPLES = 4096
"""Most samples of one prompt: each takes a slot of the cache."""

MAX_TEMPERATURE = float(np.finfo(np.float32).max)
"""The device draws in float32."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue. Sample j of num_samples draws with seed + j, and from `index` (see `choose_tokens`)."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    index: int = 0
    stop_tokens: frozenset[int] = frozenset()  # a sample ends after one of them, which is kept
    num_samples: int = 1
    salt: bytes = b""  # under which beginnings of prompts are shared

    @property
    def limit(self) -> int:
        """Tokens of a sample at most, prompt included."""
        return len(self.prompt) + self.max_new_tokens


@dataclass
class Sample:
    """One continuation of a request: its tokens so far, and how many of them the cache holds."""

    number: int  # of the request, in the order of submission
    index: int  # among the samples of the request
    request: Request
    ids: list[int]
    slot: int = -1  # -1 while it waits
    computed: int = 0  # the first tokens of ids, in the cache
    found: int = 0  # the first tokens of ids, of which blocks were there: before their end nothing can be copied
    snapshot: Snapshot | None = None  # of what was computed, while a sample that ran waits
    to_fork: int = 0  # samples that fork off where the prompt ends
    lookup: PromptLookup | None = None

    @property
    def age(self) -> tuple[int, int]:
        """Older samples, whose age is less, go first."""
        return self.number, self.index

    @property
    def pending(self) -> int:
        """Tokens not in the cache yet: 1 while it decodes."""
        return len(self.ids) - self.computed

    @property
    def reading(self) -> bool:
        """Whether it still reads its prompt."""
        return self.computed < len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens still to come."""
        return self.request.limit - len(self.ids)

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str | None]:
        """Adds drawn tokens up to the end of the sample -> those added, and why it ended (None: it did not)."""
        new, finished = [], None
        for token in tokens[: self.remaining]:
            new.append(token)
            if token in self.request.stop_tokens:
                finished = "stop"
                break
        self.ids.extend(new)
        if self.lookup is not None:
            self.lookup.extend(new)
        return new, finished or ("length" if not self.remaining else None)


@dataclass(frozen=True)
class Event:
    """What one call of the loop brought for one sample."""

    request: int  # what `submit` returned
    sample: int
    tokens: list[int] = field(default_factory=list)
    logits: np.ndarray | None = None  # (n, vocabulary) float32 the tokens were chosen from, where asked for
    prompt_tokens: int = 0  # prompt tokens that went into the cache
    finished: str | None = None  # "length" | "stop" | "aborted"


@dataclass
class Stats:
    """Counts of a loop so far."""

    calls: int = 0  # of jitted functions
    prefilled_tokens: int = 0  # prompt tokens computed
    hit_tokens: int = 0  # prompt tokens that were found in blocks of earlier prompts
    recomputed_tokens: int = 0  # of these, tokens that were computed all the same, for the state of the layers
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None without drafts."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


def check_prompt(config: DSV4Config, prompt: Any, max_new_tokens: int, name: str = "the prompt") -> tuple[int, ...]:
    """The prompt's token ids; ValueError for what is no list of them, or too long for the model."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} is {str(prompt)[:60]!r}: expected a list of one or more token ids")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"{name} has token ids from {ids.min()} to {ids.max()}: expected 0 to {config.vocab_size - 1}")
    if len(ids) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{name} has {len(ids)} tokens and {max_new_tokens} shall follow: the model has "
            f"{config.max_position_embeddings} positions"
        )
    return tuple(ids.tolist())


def check_prompts(prompts: Any) -> list[Any]:
    """Prompts of any iterable; ValueError for what is none."""
    try:
        return list(prompts)
    except TypeError:
        raise ValueError(f"prompts is {str(prompts)[:60]!r}: expected a list of prompts, lists of token ids") from None


def check_sampling(
    config: DSV4Config, *, temperature: float, seed: int, stop_tokens: Iterable[int], num_samples: int
) -> frozenset[int]:
    """The stop tokens; ValueError for options that make no sense."""
    try:
        drawable = 0 <= temperature <= MAX_TEMPERATURE  # NaN is not
    except TypeError:
        drawable = False
    if not drawable:
        raise ValueError(
            f"temperature is {temperature!r}: expected 0 (greedy) or a positive number, at most {MAX_TEMPERATURE:.5g}"
        )
    count("seed", seed, most=(1 << 32) - 1)
    count("num_samples", num_samples, least=1, most=MAX_SAMPLES)
    try:
        stops = frozenset(operator.index(token) for token in stop_tokens)
    except TypeError:
        raise ValueError(f"stop_tokens are {stop_tokens!r}: expected a list of token ids") from None
    if any(not 0 <= token < config.vocab_size for token in stops):
        raise ValueError(f"stop_tokens are {sorted(stops)}: expected 0 to {config.vocab_size - 1}")
    return stops
