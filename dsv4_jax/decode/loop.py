"""Continuous batching: requests join and leave between jitted calls, whose shapes never change."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..cache.counts import count
from ..cache.host.prefix import check_salt
from ..cache.manager import KVCacheManager
from ..cache.plan import StepPlan
from ..model.step_inputs import check_cache
from ..model.transformer import DSV4Model
from .context import blocks_to_read
from .draft import PromptLookup
from .layout import Part, draw_arrays, slot_arrays, token_arrays
from .request import Event, Request, Sample, Stats, check_prompt, check_sampling
from .sampling import Draws
from .scheduler import Schedule
from .steps import LoopState, decode_steps, prefill_step, split_model

PREFILL_CHUNK = 128
"""Tokens of a prompt that one prefill step takes."""

DECODE_STEPS = 16
"""Decode steps in one jitted call."""


class DecodeLoop:
    """Runs requests through a model together, over the slots and blocks of one manager.

    A call is either `decode_steps` (everybody decodes, many steps at once) or `prefill_step` (some prompts are read, a
    chunk each, while the others bring a decode token; with drafts every step is one). Where slots or blocks run out,
    the youngest wait. Programs compile once per number of blocks that readers look at (see `blocks_to_read`).
    """

    def __init__(
        self,
        model: DSV4Model,
        manager: KVCacheManager,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        step_tokens: int | None = None,
        decode_chunk: int = DECODE_STEPS,
        draft_tokens: int = 0,
        return_logits: bool = False,
    ):
        """prefill_chunk: tokens of one prompt in a step at most. step_tokens: tokens of all of them in a step at most,
        by default one chunk and a decode token for every other slot. decode_chunk: steps of a decode call.
        draft_tokens: prompt-lookup drafts verified in a step at most (the manager's max_rollback must be no less).

        Raises ValueError for sizes that make no sense and for a manager made for another configuration.
        """
        prefill_chunk = count("prefill_chunk", prefill_chunk, least=1)
        decode_chunk = count("decode_chunk", decode_chunk, least=1)
        if count("draft_tokens", draft_tokens) > manager.max_rollback:
            raise ValueError(f"draft_tokens is {draft_tokens}: expected 0 to max_rollback = {manager.max_rollback}")
        check_cache(model.config, manager.cache)
        slots, verified = manager.max_concurrent_requests, draft_tokens + 1
        if step_tokens is None:
            step_tokens = prefill_chunk + (slots - 1) * verified
        if count("step_tokens", step_tokens) < slots:
            raise ValueError(f"step_tokens is {step_tokens}: expected one for each of {slots} slots or more")
        self.model, self.manager, self.stats = model, manager, Stats()
        self.prefill_chunk, self.decode_chunk, self.draft_tokens = prefill_chunk, decode_chunk, draft_tokens
        self.return_logits = return_logits
        # Tokens of a step, tokens of one slot in it.
        self._prefill_shape = max(step_tokens, slots * verified), max(prefill_chunk, verified)
        self._verify_shape = slots * verified, verified
        self._structure, self._weights = split_model(model)
        self._schedule = Schedule(manager, verified if draft_tokens else decode_chunk, self.stats)
        self._submitted = 0
        self._aborted: list[Event] = []
        self._on_device: tuple[LoopState, Draws] | None = None  # of the slots, as long as the host changes nothing

    # Requests.

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        index: int = 0,
        stop_tokens: Iterable[int] = (),
        num_samples: int = 1,
        salt: bytes = b"",
    ) -> int:
        """Queues a request -> its number. Sample j draws with seed + j; a draw follows from that, index and position.

        salt: where the manager has a prefix policy, a prompt goes on from blocks of earlier ones of the same salt.
        Raises ValueError, in one sentence, for what makes no sense and for what this cache could never hold.
        """
        config = self.model.config
        max_new_tokens = count("max_new_tokens", max_new_tokens, least=1)
        ids = check_prompt(config, prompt, max_new_tokens)
        stops = check_sampling(
            config, temperature=temperature, seed=seed, stop_tokens=stop_tokens, num_samples=num_samples
        )
        check_salt(salt)
        index = count("index", index, most=(1 << 31) - 1)
        request = Request(ids, max_new_tokens, temperature, seed, index, stops, num_samples, salt)
        self._schedule.check_fits(request)
        self._schedule.wait(self._sample(self._submitted, 0, request, num_samples - 1))
        self._submitted += 1
        return self._submitted - 1

    def _sample(self, number: int, index: int, request: Request, to_fork: int = 0) -> Sample:
        lookup = PromptLookup(request.prompt) if self.draft_tokens else None
        return Sample(number, index, request, list(request.prompt), to_fork=to_fork, lookup=lookup)

    def abort(self, request: int) -> None:
        """Ends a request, whether it waits, is being read or decodes; ValueError if it has ended or never was."""
        schedule = self._schedule
        samples = [s for s in (*schedule.waiting, *schedule.running) if s.number == request]
        if not samples:
            raise ValueError(f"request {request} neither waits nor runs: it has ended, or was never submitted")
        for sample in samples:
            schedule.drop(sample)
            parting = range(sample.index, sample.index + sample.to_fork + 1)
            self._aborted += [Event(request, index, finished="aborted") for index in parting]
        self._on_device = None

    @property
    def unfinished(self) -> int:
        """Samples that wait or run."""
        return sum(1 + s.to_fork for s in (*self._schedule.waiting, *self._schedule.running))

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, until nothing is left to do; requests may be submitted and aborted meanwhile."""
        while self.unfinished or self._aborted:
            yield from self.step()

    # Calls.

    def step(self) -> list[Event]:
        """One jitted call -> what it brought, an event for each sample that took part."""
        events, self._aborted = self._aborted, []
        if self._schedule.admit():
            self._on_device = None
        if not self._schedule.running:
            return events
        self.stats.calls += 1
        if self.draft_tokens or any(s.reading for s in self._schedule.running):
            return events + self._mixed_call()
        return events + self._decode_call()

    def _plan(self, parts: Sequence[Part], slots: np.ndarray, positions: np.ndarray, **shape: Any) -> StepPlan | None:
        """The step's plan, or None where blocks ran out and the youngest gave its own back: the step is another."""
        read = max(blocks_to_read(part.end, part.sample.request.limit, self.manager.block_size) for part in parts)
        try:
            return self.manager.plan_step(slots, positions, max_blocks=read, **shape)
        except RuntimeError:
            if len(self._schedule.running) == 1:
                raise
            self._schedule.preempt_youngest()
            self._on_device = None
            return None

    def _decode_call(self) -> list[Event]:
        """Many steps for everybody in one call, for which the host waits once."""
        num_slots, running = self.manager.max_concurrent_requests, self._schedule.running
        while True:
            parts = [Part(s, [s.ids[-1]] * min(self.decode_chunk, s.remaining)) for s in running]
            slots, starts, ends = np.full(num_slots, -1, np.int32), *np.zeros((2, num_slots), np.int32)
            for part in parts:
                s = part.sample
                slots[s.slot], starts[s.slot], ends[s.slot] = s.slot, s.computed, part.end
            plan = self._plan(parts, slots, starts, lookahead=self.decode_chunk - 1, limits=ends)
            if plan is not None:
                break
        for part in parts:
            self.manager.advance(part.sample.slot, len(part.tokens) - 1)
        loop, draws = self._on_device or jax.device_put(slot_arrays(running, num_slots))
        tokens, logits, loop, self.manager.cache = decode_steps(
            self._structure, self._weights, self.manager.cache, loop, plan.new_blocks, draws,
            steps=self.decode_chunk, max_blocks=plan.max_blocks, return_logits=self.return_logits,
        )  # fmt: skip
        self._on_device = loop, draws
        tokens, logits = np.asarray(tokens), np.asarray(logits) if self.return_logits else None
        events = []
        for part in parts:
            here = np.s_[: len(part.tokens), part.sample.slot]
            part.sample.computed = part.end
            events.append(self._take(part.sample, tokens[here].tolist(), None if logits is None else logits[here]))
        return events

    def _mixed_call(self) -> list[Event]:
        """Chunks of prompts beside the decode tokens of the others, and drafts to verify."""
        num_slots = self.manager.max_concurrent_requests
        while True:
            reading = any(s.reading for s in self._schedule.running)
            total, width = self._prefill_shape if reading else self._verify_shape
            parts = self._parts(total)
            ids, slots, positions = token_arrays(parts, total)
            if (plan := self._plan(parts, slots, positions, num_segments=num_slots, width=width)) is not None:
                break
        rows, draws = draw_arrays(parts, num_slots * (self.draft_tokens + 1))
        chosen, logits, self.manager.cache = prefill_step(
            self._structure, self._weights, self.manager.cache, plan, ids, rows, draws
        )
        self._on_device = None
        chosen, logits = np.asarray(chosen).tolist(), np.asarray(logits) if self.return_logits else None
        events, drawn = [], 0
        for part in parts:
            here = np.s_[drawn : drawn + part.draws]
            drawn += part.draws
            events += self._finish(part, chosen[here], None if logits is None else logits[here])
        return events

    def _parts(self, total: int) -> list[Part]:
        """What each running sample brings to a step of `total` tokens: decode tokens first, then chunks of prompts."""
        parts, running = [], self._schedule.running
        for s in running:
            if not s.reading:
                most = min(self.draft_tokens, s.remaining - 1)
                drafts = s.lookup.propose(most) if s.lookup else []
                parts.append(Part(s, [s.ids[-1], *drafts], len(drafts), len(drafts) + 1))
        left = total - sum(len(part.tokens) for part in parts)
        for s in running:
            if s.reading and left:
                tokens = s.ids[s.computed : self._chunk_end(s, min(self.prefill_chunk, left))]
                parts.append(Part(s, tokens, 0, 1 + s.to_fork if len(tokens) == s.pending else 0))
                left -= len(tokens)
        return parts

    def _chunk_end(self, s: Sample, most: int) -> int:
        """Where the next chunk of a prompt ends: at the edge of a block, if blocks are to be kept for other prompts."""
        end = min(s.computed + most, len(s.ids))
        edge = end - end % self.manager.block_size
        return end if self.manager.prefix_policy is None or edge <= s.computed else edge

    # Results.

    def _finish(self, part: Part, chosen: list[int], logits: np.ndarray | None) -> list[Event]:
        """Books what a step brought for one sample, and for those that fork off it."""
        s = part.sample
        if part.drafts:
            accepted = 0
            while accepted < part.drafts and chosen[accepted] == part.tokens[1 + accepted]:
                accepted += 1
            self.stats.drafted_tokens += part.drafts
            self.stats.accepted_tokens += accepted
            s.computed += 1 + accepted
            if accepted < part.drafts:
                self.manager.rollback(s.slot, part.drafts - accepted)
            return [self._take(s, chosen[: 1 + accepted], logits)]
        prompt_tokens = len(part.tokens) if s.reading else 0
        self.stats.prefilled_tokens += prompt_tokens
        s.computed = part.end
        if prompt_tokens and s.computed >= s.found and s.computed % self.manager.block_size == 0:
            self.manager.keep_prefix(s.slot, s.ids[: s.computed], salt=s.request.salt)
        forked = [
            self._fork(s, i, chosen[i], None if logits is None else logits[i : i + 1]) for i in range(1, part.draws)
        ]
        s.to_fork -= len(forked)
        return [self._take(s, chosen[:1], logits, prompt_tokens), *forked]

    def _fork(self, parent: Sample, index: int, token: int, logits: np.ndarray | None) -> Event:
        """Another sample begins where the prompt ends; where blocks are missing for it, it waits."""
        s = self._sample(parent.number, index, parent.request)
        new, finished = s.take([token])
        if not finished:
            self._schedule.fork(parent, s)
        return Event(s.number, index, new, logits, finished=finished)

    def _take(self, s: Sample, tokens: list[int], logits: np.ndarray | None, prompt_tokens: int = 0) -> Event:
        """Adds tokens to a sample; one that has ended gives back what it holds."""
        new, finished = s.take(tokens)
        if finished:
            self._schedule.drop(s)
            self._on_device = None
        return Event(
            s.number, s.index, new, logits[: len(new)] if logits is not None and new else None, prompt_tokens, finished
        )
