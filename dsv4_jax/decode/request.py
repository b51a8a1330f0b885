"""What a decode loop is asked for, and what it answers."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cache.counts import count
from ..cache.transfer.snapshot import Snapshot
from ..model.config import DSV4Config
from .draft import PromptLookup
from .sampling import LogProbs

MAX_SAMPLES = 4096
"""Most samples of one prompt: each takes a slot of the cache."""

MAX_TEMPERATURE = float(np.finfo(np.float32).max)
"""The device draws in float32."""


@dataclass(frozen=True, eq=False)
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
    top_k: int = 0  # draw from the k most likely; 0: from all
    top_p: float = 1.0  # draw from the fewest most likely that have this probability together
    min_p: float = 0.0  # draw from those at least this times as likely as the most likely
    stop_texts: tuple[str, ...] = ()  # a sample ends with the token that completes one of them, which is kept
    decode: Callable[[list[int]], str] | None = None  # token ids to text, for stop_texts
    hook_argument: Any = None  # for LogitsHook.start

    @property
    def limit(self) -> int:
        """Tokens of a sample at most, prompt included."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(eq=False)
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
    read_to: int = 0  # tokens of ids that are read before it decodes; 0: those of the prompt
    lookup: PromptLookup | None = None

    def __post_init__(self) -> None:
        self.read_to = self.read_to or len(self.ids)

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
        """Whether it still reads its prompt, or what it had before the cache lost it."""
        return self.computed < self.read_to

    @property
    def remaining(self) -> int:
        """Tokens still to come."""
        return self.request.limit - len(self.ids)

    def start_again(self) -> None:
        """What the cache held of it is gone: it waits, and reads its tokens again."""
        self.slot, self.computed, self.found, self.snapshot, self.read_to = -1, 0, 0, None, len(self.ids)

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str | None]:
        """Adds drawn tokens up to the end of the sample -> those added, and why it ended (None: it did not)."""
        new, finished = [], None
        for token in tokens[: self.remaining]:
            new.append(token)
            if token in self.request.stop_tokens or self._ends_in_stop_text(new):
                finished = "stop"
                break
        self.ids.extend(new)
        if self.lookup is not None:
            self.lookup.extend(new)
        return new, finished or ("length" if not self.remaining else None)

    def _ends_in_stop_text(self, new: list[int]) -> bool:
        """Whether the newest token completes a stop text; every token but special ones has a byte or more."""
        request = self.request
        if not request.stop_texts or request.decode is None:
            return False
        most = max(len(text.encode()) for text in request.stop_texts) + 8
        text = request.decode([*self.ids[max(len(request.prompt), len(self.ids) + len(new) - most) :], *new][-most:])
        return any(stop in text for stop in request.stop_texts)


@dataclass(frozen=True)
class Event:
    """What one call of the loop brought for one sample."""

    request: int  # what `submit` returned
    sample: int
    tokens: list[int] = field(default_factory=list)
    logits: Any = None  # numpy (n, vocabulary) float32 the tokens were chosen from, where asked for
    log_probs: LogProbs | None = None  # numpy, (n, ...), where asked for
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
    restarts: int = 0  # samples that read their tokens again, because a step that failed took the cache with it
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


@dataclass(frozen=True)
class Sampling:
    """How samples of a prompt are drawn and when they end, as a caller gives it; see `Request`."""

    temperature: float
    seed: int
    stop_tokens: Iterable[int]
    num_samples: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_texts: Iterable[str] = ()
    decode: Callable[[list[int]], str] | None = None

    def checked(self, config: DSV4Config) -> dict[str, Any]:
        """The options as `Request` takes them; ValueError for options that make no sense."""
        temperature, top_p, min_p, decode = self.temperature, self.top_p, self.min_p, self.decode
        if not _within(temperature, 0, MAX_TEMPERATURE):  # NaN is not
            raise ValueError(
                f"temperature is {temperature!r}: expected 0 (greedy) or a positive number, at most "
                f"{MAX_TEMPERATURE:.5g}"
            )
        count("seed", self.seed, most=(1 << 32) - 1)
        count("num_samples", self.num_samples, least=1, most=MAX_SAMPLES)
        top_k = count("top_k", self.top_k, most=(1 << 31) - 1)
        if not _within(top_p, 0, 1) or not top_p > 0:
            raise ValueError(f"top_p is {top_p!r}: expected a number above 0, at most 1 (all tokens)")
        if not _within(min_p, 0, 1):
            raise ValueError(f"min_p is {min_p!r}: expected a number from 0 (all tokens) to 1")
        try:
            stops = frozenset(operator.index(token) for token in self.stop_tokens)
        except TypeError:
            raise ValueError(f"stop_tokens are {self.stop_tokens!r}: expected a list of token ids") from None
        if any(not 0 <= token < config.vocab_size for token in stops):
            raise ValueError(f"stop_tokens are {sorted(stops)}: expected 0 to {config.vocab_size - 1}")
        given: Any = self.stop_texts
        texts: tuple[Any, ...] = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop_texts are {given!r}: expected texts of one character or more")
        if texts and decode is None:
            if config.vocab_size != 256:
                raise ValueError(
                    "stop_texts need `decode`, which turns token ids into text: this vocabulary is not bytes"
                )
            decode = _decode_bytes
        return {
            "temperature": temperature,
            "seed": self.seed,
            "stop_tokens": stops,
            "num_samples": self.num_samples,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "stop_texts": texts,
            "decode": decode,
        }


def _within(value: Any, least: float, most: float) -> bool:
    try:
        return bool(least <= value <= most)
    except TypeError:
        return False


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")
