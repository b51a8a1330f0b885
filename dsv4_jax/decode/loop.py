"""Continuous batching: requests join and leave between jitted calls, whose shapes never change."""

import contextlib
import logging
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from ..cache.counts import count
from ..cache.host.prefix import check_salt
from ..cache.manager import KVCacheManager
from ..cache.plan import StepPlan
from ..cache.sharded_manager import ShardedKVCacheManager, ShardError
from ..cache.sharding import no_context_mesh
from ..model.step_inputs import check_cache
from ..model.transformer import DSV4Model, check_model
from .context import blocks_to_read
from .draft import PromptLookup
from .layout import Part, draw_arrays, row_states, slot_arrays, token_arrays
from .programs import PROCESS_TIMEOUT_S, OneDevice, OverMesh
from .recovery import Call, Savepoint, identity, is_lost
from .request import Event, Request, Sample, Sampling, Stats, check_prompt
from .sampling import Draws, LogitsHook, LogProbs
from .scheduler import Scheduler
from .snapshot import RequestSnapshot, SampleSnapshot
from .steps import Chosen, DecodeInputs, DecodeProgram, LoopState, PrefillInputs, Wanted, decode_steps, prefill_step

T = TypeVar("T")

PREFILL_CHUNK = 128
"""Tokens of a prompt that one prefill step takes."""

DECODE_STEPS = 16
"""Decode steps in one jitted call."""

_NOTHING, _DECODE, _VERIFY, _READ = range(4)
"""Kinds of calls: where processes wish for different ones, the last of them serves all."""

_compiled: set[Any] = set()
"""What `compile_decode` was asked for: programs stay compiled."""


class DecodeLoop:
    """Runs requests through a model together, over the slots and blocks of one manager.

    A call is either `decode_steps` (everybody decodes, many steps at once) or `prefill_step` (some prompts are read, a
    chunk each, while the others bring a decode token; with drafts every step is one). Where slots or blocks run out,
    the youngest wait. Programs compile once per number of blocks that readers look at (see `blocks_to_read`).

    A call that raises, Ctrl-C included, has happened or has not: calling again continues, with the same tokens. Where a
    step that failed took the donated cache with it, the loop makes a new one, logs a warning, and the requests read
    their tokens again (`stats.restarts`); what other users of the manager had in the cache is gone.

    With a model and a manager over a mesh (`shard_model`, `ShardedKVCacheManager`) every call runs on all its devices:
    a request goes to the shard with the longest prefix hit, then to the one that has least to do; a shard without work
    runs padding; a preempted request resumes wherever there is room first. Sizes are those of a shard.

    Where the mesh has devices of several processes, each has a loop of its own, of the same sizes, with its own
    requests, and all take their calls together: whoever iterates over one, or calls `step`, does so in every process.
    Before a call they agree on its shape, the largest that one of them needs; who has nothing to do runs padding. An
    exception in one process is the end of all of them.
    """

    def __init__(
        self,
        model: DSV4Model,
        manager: KVCacheManager | ShardedKVCacheManager,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        step_tokens: int | None = None,
        decode_chunk: int = DECODE_STEPS,
        draft_tokens: int = 0,
        return_logits: bool = False,
        log_probs: int | None = None,
        logits_hook: LogitsHook | None = None,
        process_timeout_s: float = PROCESS_TIMEOUT_S,
    ):
        """Makes a loop over an empty or a running manager.

        Args:
          model: from `from_pretrained` or `random_model`.
          manager: of the same configuration, such as `make_manager` returns.
          prefill_chunk: tokens of one prompt in a step at most.
          step_tokens: tokens of all prompts in a step at most, by default one chunk and a decode token for every other
            slot.
          decode_chunk: steps of a decode call.
          draft_tokens: prompt-lookup drafts verified in a step at most; the manager's max_rollback must be no less.
          return_logits: whether events have the logits.
          log_probs: with a number, 0 or more, events have the log-probability of each token and of that many of the
            most likely ones; None for neither.
          logits_hook: changes logits before a token is chosen.
          process_timeout_s: where several processes step together, seconds that one waits for the others, also for the
            programs that they compile; then RuntimeError.

        Raises:
          ValueError: no model or no manager, sizes that make no sense, or a manager made for another configuration.
        """
        check_model(model)
        if not isinstance(manager, KVCacheManager | ShardedKVCacheManager):
            raise ValueError(
                f"manager is a {type(manager).__name__}: expected a KVCacheManager or a ShardedKVCacheManager, such as "
                "make_manager returns"
            )
        prefill_chunk = count("prefill_chunk", prefill_chunk, least=1)
        decode_chunk = count("decode_chunk", decode_chunk, least=1)
        if count("draft_tokens", draft_tokens) > manager.max_rollback:
            raise ValueError(f"draft_tokens is {draft_tokens}: expected 0 to max_rollback = {manager.max_rollback}")
        if not process_timeout_s > 0:
            raise ValueError(f"process_timeout_s is {process_timeout_s}: expected seconds, more than 0")
        if log_probs is not None:
            log_probs = count("log_probs", log_probs, most=model.config.vocab_size)
        check_cache(model.config, manager.cache)
        mesh = manager.mesh if isinstance(manager, ShardedKVCacheManager) else None
        if model.mesh != mesh:
            raise ValueError(
                f"the model lies on {_place(model.mesh)} and the cache on {_place(mesh)}: expected shard_model(model, "
                "mesh) and ShardedKVCacheManager(..., mesh=mesh) with one mesh, or neither"
            )
        self.stats = Stats()
        self._schedule = Scheduler(manager, draft_tokens + 1 if draft_tokens else decode_chunk, self.stats)
        slots, verified = self._schedule.slots_per_shard, draft_tokens + 1
        if step_tokens is None:
            step_tokens = prefill_chunk + (slots - 1) * verified
        if count("step_tokens", step_tokens) < slots:
            raise ValueError(f"step_tokens is {step_tokens}: expected one for each of {slots} slots or more")
        self.model, self.manager = model, manager
        self.prefill_chunk, self.decode_chunk, self.draft_tokens = prefill_chunk, decode_chunk, draft_tokens
        self.return_logits = return_logits
        self._programs = OneDevice(model) if mesh is None else OverMesh(model, mesh, process_timeout_s)
        self._wanted = Wanted(bool(return_logits), log_probs, logits_hook)
        # Tokens of a step, tokens of one slot in it; of every shard.
        self._prefill_shape = max(step_tokens, slots * verified), max(prefill_chunk, verified)
        self._verify_shape = slots * verified, verified
        self._events: list[Event] = []  # that were not handed out yet
        self._call: Call | None = None  # under way, or interrupted
        self._on_device: tuple[LoopState, Draws] | None = None  # of the slots, as long as the host changes nothing
        self._together = mesh is not None and mesh.is_multi_process
        self._others_busy = False  # whether a process had something to do when the last call was agreed upon
        if self._together:
            self._compare({
                "step_tokens": self._prefill_shape[0], "prefill_chunk": self._prefill_shape[1], "slots": slots,
                "draft_tokens": draft_tokens, "decode_chunk": decode_chunk, "return_logits": int(return_logits),
                "log_probs": -1 if log_probs is None else log_probs, "logits_hook": int(logits_hook is not None),
                "max_context_len": manager.max_context_len, "the cache": _digest(_forms(manager.cache)),
                "the model": _digest(repr(model.config), _forms(self._programs.weights)),
            })  # fmt: skip

    def _compare(self, sizes: dict[str, int]) -> None:
        """ValueError, which names them, where the processes' sizes differ: they would wait for each other forever."""
        own = [*sizes.values(), *(-n for n in sizes.values())]
        if (most := self._programs.agree(own)) == own:
            return
        differ = [
            name if name.startswith("the ") else f"{name} ({'none' if own[i] < 0 else own[i]} here)"
            for i, name in enumerate(sizes)
            if (own[i], own[i + len(sizes)]) != (most[i], most[i + len(sizes)])
        ]
        raise ValueError(f"the processes' loops differ in {' and '.join(differ)}: expected the same in all")

    # Requests.

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        index: int = 0,
        stop_tokens: Iterable[int] = (),
        stop_texts: Iterable[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        num_samples: int = 1,
        salt: bytes = b"",
        hook_argument: Any = None,
    ) -> int:
        """Queues a request -> its number.

        Args:
          prompt: token ids.
          max_new_tokens: 1 or more.
          temperature: 0 takes the most likely token.
          top_k, top_p, min_p: draw only from the k most likely tokens (0: all), then from the fewest most likely of
            them that have the probability top_p together (1: all), then from those at least min_p times as likely as
            the most likely (0: all); equally likely ones stay or go together. All after the temperature.
          seed, index: sample j draws with seed + j; a draw follows from that, index and position.
          stop_tokens: a sample ends after one of them.
          stop_texts: a sample ends with the token that completes one of them in its new text, which is kept.
          decode: token ids to text, for stop_texts; not needed where tokens are bytes.
          num_samples: continuations of the prompt, which is read once.
          salt: where the manager has a prefix policy, a prompt continues from blocks of earlier texts of the same salt.
          hook_argument: for `LogitsHook.start`.

        Raises:
          ValueError: in one sentence, for what makes no sense and for what this cache could never hold.
        """
        config = self.model.config
        max_new_tokens = count("max_new_tokens", max_new_tokens, least=1)
        ids = check_prompt(config, prompt, max_new_tokens)
        sampling = Sampling(temperature, seed, stop_tokens, num_samples, top_k, top_p, min_p, stop_texts, decode)
        check_salt(salt)
        index = count("index", index, most=(1 << 31) - 1)
        request = Request(
            ids, max_new_tokens, index=index, salt=salt, hook_argument=hook_argument, **sampling.checked(config)
        )
        self._schedule.check_fits(request)

        def queue() -> int:
            number = self._schedule.submitted
            self._schedule.wait(self._sample(number, 0, request, request.num_samples - 1))
            self._schedule.submitted = number + 1
            return number

        return self._whole(queue)

    def _sample(self, number: int, index: int, request: Request, to_fork: int = 0) -> Sample:
        lookup = PromptLookup(request.prompt) if self.draft_tokens else None
        return Sample(number, index, request, list(request.prompt), to_fork=to_fork, lookup=lookup)

    def _samples(self, request: int) -> list[Sample]:
        samples = [s for s in (*self._schedule.waiting, *self._schedule.running) if s.number == request]
        if not samples:
            raise ValueError(f"request {request} neither waits nor runs: it has ended, or was never submitted")
        return samples

    def abort(self, request: int) -> None:
        """Ends a request, whether it waits, is being read or decodes.

        Args:
          request: its number.

        Raises:
          ValueError: it has ended, or never was.
        """
        self._recover()
        samples = self._samples(request)

        def end() -> None:
            for sample in samples:
                self._schedule.drop(sample)
                parting = range(sample.index, sample.index + sample.to_fork + 1)
                self._events.extend(Event(request, index, finished="aborted") for index in parting)
            self._on_device = None

        self._whole(end)

    def snapshot(self, request: int) -> RequestSnapshot:
        """A copy of a request outside the loop: its options, its samples' tokens and their parts of the cache.

        Events that were not handed out yet are not part of it.

        Args:
          request: its number.

        Returns:
          The copy, for `adopt`.

        Raises:
          ValueError: the request has ended, or never was.
        """
        self._recover()
        samples = []
        for s in self._samples(request):
            cache, computed = s.snapshot, s.computed
            if s.slot >= 0 and computed >= max(s.found, 1):
                cache = self.manager.snapshot(s.slot)
            if cache is None:
                computed = 0  # nothing that is complete: it reads its tokens again
            samples.append(SampleSnapshot(s.index, tuple(s.ids), computed, s.to_fork, s.read_to, cache))
        return RequestSnapshot(self._samples(request)[0].request, tuple(samples))

    def adopt(self, snapshot: RequestSnapshot) -> int:
        """Queues a request that resumes where a snapshot was taken, in this loop or another.

        Args:
          snapshot: from `snapshot`.

        Returns:
          The request's number here.

        Raises:
          ValueError: this cache could never hold the request. At its admission ValueError or RuntimeError, where the
            snapshot is of another model.
        """
        given: Any = snapshot
        if not isinstance(given, RequestSnapshot):
            raise ValueError(f"adopt got a {type(given).__name__}: expected what DecodeLoop.snapshot returns")
        self._schedule.check_fits(snapshot.request)
        for s in snapshot.samples:
            if s.cache is not None:
                self.manager.check_restorable(s.cache)

        def queue() -> int:
            number = self._schedule.submitted
            for s in snapshot.samples:
                sample = self._sample(number, s.index, snapshot.request, s.to_fork)
                sample.ids[:] = s.ids
                sample.computed, sample.read_to, sample.snapshot = s.computed, s.read_to, s.cache
                if s.cache is None:
                    sample.start_again()
                if sample.lookup is not None:
                    sample.lookup = PromptLookup(sample.ids)
                self._schedule.wait(sample)
            self._schedule.submitted = number + 1
            return number

        return self._whole(queue)

    @property
    def unfinished(self) -> int:
        """Samples that wait or run, or whose last event was not handed out yet."""
        samples = sum(1 + s.to_fork for s in (*self._schedule.waiting, *self._schedule.running))
        return samples + sum(event.finished is not None for event in self._events)

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, until nothing is left to do; requests may be submitted and aborted meanwhile.

        After a break, or calls of `step` in between, iteration continues with the next event.
        """
        self._others_busy = self._together
        while self._events or self.unfinished or self._others_busy:
            if self._events:
                event = self._events[0]
                del self._events[0]
                yield event
            else:
                self._whole(self._advance)

    # Calls. Python hears Ctrl-C at the end of a function's call: between the removal of events and their handing out
    # there is none.

    def step(self) -> list[Event]:
        """One jitted call -> what it brought, an event for each sample that took part, after those still to be had.

        The events are the caller's from then on: a Ctrl-C between two of them ends the caller's own loop over the list.
        Who iterates over the `DecodeLoop` instead and is interrupted finds the rest when it comes back.
        """
        self._whole(self._advance)
        events = self._events[:]
        del self._events[:]
        return events

    def _advance(self) -> None:
        if self._schedule.admit():
            self._on_device = None
        running = self._schedule.running
        call = _NOTHING
        if running:
            call = _READ if any(s.reading for s in running) else _VERIFY if self.draft_tokens else _DECODE
        least = 0
        if self._together:
            # What is read depends on the call: enough for whichever it will be.
            most = max(self.decode_chunk, self.prefill_chunk, self.draft_tokens + 1)
            read = [self._blocks_to_read(min(s.computed + most, s.request.limit), s) for s in running]
            call, least = self._programs.agree([call, max(read, default=1)])
            self._others_busy = call != _NOTHING
        if call == _DECODE:
            self._decode_call(least)
        elif call != _NOTHING:
            self._mixed_call(call, least)

    def _blocks_to_read(self, end: int, s: Sample) -> int:
        return blocks_to_read(end, s.request.limit, self.manager.block_size)

    def _plan(
        self, parts: list[Part], slots: np.ndarray, positions: np.ndarray, least: int, **shape: Any
    ) -> StepPlan | None:
        """The step's plan, or None where blocks ran out and the youngest gave its own back: the step is another."""
        assert self._call is not None
        read = max([least, *(self._blocks_to_read(part.end, part.sample) for part in parts)])
        try:
            plan = self.manager.plan_step(slots, positions, max_blocks=read, **shape)
        except RuntimeError as error:
            shard = error.shard if isinstance(error, ShardError) else 0
            if len(self._schedule.on(shard)) <= 1:
                raise
            self._schedule.preempt_youngest(shard)
            self._on_device = None
            # What the youngest had is in the host's memory: from here on it has left.
            self._call.savepoint = Savepoint(self._schedule, self.stats, self._events)
            self._give_back()
            return None
        self._call.plan, self._call.parts = plan, parts
        return plan

    def _decode_call(self, least: int) -> None:
        """Many steps for everybody in one call, for which the host waits once; at least `least` blocks are read."""
        assert self._call is not None
        num_slots, running = self.manager.max_concurrent_requests, self._schedule.running
        while True:
            parts = [Part(s, [s.ids[-1]] * self._decode_tokens(s)) for s in running]
            slots, starts, ends = np.full(num_slots, -1, np.int32), *np.zeros((2, num_slots), np.int32)
            for part in parts:
                s = part.sample
                slots[s.slot], starts[s.slot], ends[s.slot] = s.slot, s.computed, part.end
            plan = self._plan(parts, slots, starts, least, lookahead=self.decode_chunk - 1, limits=ends)
            if plan is not None:
                break
        # Who stops at the edge of a block has fewer tokens to come than the device believes.
        short = any(len(part.tokens) < min(self.decode_chunk, part.sample.remaining) for part in parts)
        to_come = [(p.sample, len(p.tokens) if short else p.sample.remaining) for p in parts]
        on_device = None if short else self._on_device
        loop, draws = on_device or self._programs.put(slot_arrays(to_come, num_slots, self._wanted.hook))
        decode = self._programs.over(decode_steps)
        step = partial(decode, program=DecodeProgram(self.decode_chunk, plan.max_blocks, self._wanted))
        self._dispatch(step, loop, DecodeInputs(self._programs.operands(plan.new_blocks), draws))
        state = jax.tree.unflatten(jax.tree.structure(loop), self._call.results[0][1])
        self._on_device = None if short else (state, draws)
        self._book(self._call)

    def compile_decode(self) -> threading.Thread | None:
        """Compiles the program of the first decode call beside what else is going on -> the thread that does; None
        where none is needed: nothing waits or runs, every step is one of drafts, or the program was asked for before.
        """
        samples = [*self._schedule.waiting, *self._schedule.running]
        if self._together or not samples or self.draft_tokens or all(s.remaining < 2 for s in samples):
            return None
        num_slots, size = self.manager.max_concurrent_requests, self.manager.block_size
        ends = [(len(s.ids) + min(self.decode_chunk, s.remaining - 1), s.request.limit) for s in samples]
        max_blocks = max(blocks_to_read(end, limit, size) for end, limit in ends)
        programs, cache = self._programs, self._programs.shapes(self.manager.cache)
        key = programs.key, str(jax.tree.leaves(cache))
        known = programs.structure, self._wanted, self.decode_chunk, max_blocks, key
        if known in _compiled:
            return None
        _compiled.add(known)
        loop, draws = programs.put(slot_arrays([], num_slots, self._wanted.hook))
        rows = num_slots * (-(-self.decode_chunk // size) + 1)  # as in a plan
        new_blocks = programs.operands(self._schedule.no_blocks(rows // len(self._schedule.shards)))
        program = DecodeProgram(self.decode_chunk, max_blocks, self._wanted)
        step = partial(programs.over(decode_steps), program=program)

        def compile_it() -> None:
            with contextlib.suppress(Exception):  # what is wrong, the call itself will say
                programs.compile(
                    step, programs.structure, programs.weights, cache, loop, DecodeInputs(new_blocks, draws)
                )

        thread = threading.Thread(target=compile_it, name="dsv4-jax-compile")
        thread.start()
        return thread

    def _decode_tokens(self, s: Sample) -> int:
        """Tokens of a sample in a decode call: to the edge of a block at most, if state is to be kept there."""
        most, policy, size = min(self.decode_chunk, s.remaining), self.manager.prefix_policy, self.manager.block_size
        edge = (s.computed // size + 1) * size
        return min(most, edge - s.computed) if policy is not None and policy.keeps_state(edge) else most

    def _mixed_call(self, call: int, least: int) -> None:
        """Chunks of prompts beside the decode tokens of the others, and drafts to verify; `least` as above."""
        assert self._call is not None
        num_slots = self._schedule.slots_per_shard
        while True:
            total, width = self._prefill_shape if call == _READ else self._verify_shape
            parts = self._parts(total)
            by_shard = self._schedule.by_shard(parts)
            ids, slots, positions = _side_by_side([token_arrays(own, total) for own in by_shard])
            plan = self._plan(parts, slots, positions, least, num_segments=num_slots, width=width)
            if plan is not None:
                break
            if not self._together and not any(s.reading for s in self._schedule.running):
                call = _VERIFY
        most = num_slots * (self.draft_tokens + 1)
        rows, draws = _side_by_side([draw_arrays(own, most) for own in by_shard])
        self._on_device = None
        states = _side_by_side([row_states(own, most, self._wanted.hook) for own in by_shard])
        step = partial(self._programs.over(prefill_step), wanted=self._wanted)
        self._dispatch(step, *self._programs.operands((plan, PrefillInputs(ids, rows, draws, states))))
        self._book(self._call)

    def _dispatch(self, step: Callable, *operands: Any) -> None:
        """Runs a jitted step on the cache. `map` and `extend` leave nothing in between where results could get lost."""
        assert self._call is not None
        self._call.savepoint = Savepoint(self._schedule, self.stats, self._events)  # who runs is settled
        self._call.given = self.manager.cache
        given = ([x] for x in (self._programs.structure, self._programs.weights, self._call.given, *operands))
        self._call.results.extend(map(step, *given))

    def _book(self, call: Call) -> None:
        """What a step brought becomes true on the host; once interrupted, it is done again from the savepoint."""
        drawn_leaves, *_, cache_leaves = call.results[0]
        if self.manager.cache is call.given:
            self.manager.cache = jax.tree.unflatten(jax.tree.structure(call.given), cache_leaves)
        call.plan = None
        self.stats.calls += 1
        chosen = self._wanted.chosen([self._programs.fetch(x) for x in drawn_leaves])
        if len(call.results[0]) == 3:
            for part in call.parts:
                here = np.s_[: len(part.tokens), part.sample.slot]
                self._book_decoded(part, _part(chosen, here))
        else:
            by_shard = self._schedule.by_shard(call.parts)
            most = len(chosen.tokens) // len(by_shard)
            for shard, parts in enumerate(by_shard):
                drawn = shard * most
                for part in parts:
                    self._book_part(part, _part(chosen, np.s_[drawn : drawn + part.draws]))
                    drawn += part.draws
        # One assignment, after which the call is not done again: only slots are to be given back.
        vars(call).update(savepoint=Savepoint(self._schedule, self.stats, self._events), results=[])

    def _parts(self, total: int) -> list[Part]:
        """The tokens of each running sample in a step of `total` tokens a shard: decode tokens, then prompt chunks."""
        parts, running = [], self._schedule.running
        left = [total] * len(self._schedule.shards)
        for s in running:
            if not s.reading:
                most = min(self.draft_tokens, s.remaining - 1)
                drafts = s.lookup.propose(most) if s.lookup else []
                parts.append(Part(s, [s.ids[-1], *drafts], len(drafts), len(drafts) + 1))
                left[self._schedule.shard_of(s)] -= len(parts[-1].tokens)
        for s in running:
            if s.reading and (room := left[self._schedule.shard_of(s)]):
                tokens = s.ids[s.computed : self._chunk_end(s, min(self.prefill_chunk, room))]
                parts.append(Part(s, tokens, 0, 1 + s.to_fork if len(tokens) == s.pending else 0))
                left[self._schedule.shard_of(s)] -= len(tokens)
        return parts

    def _chunk_end(self, s: Sample, most: int) -> int:
        """Where the next chunk of a prompt ends: at the edge of a block, if blocks are to be kept for other prompts."""
        end = min(s.computed + most, len(s.ids))
        edge = end - end % self.manager.block_size
        return end if self.manager.prefix_policy is None or edge <= s.computed else edge

    # Calls that are interrupted.

    def _whole(self, change: Callable[[], T]) -> T:
        """Makes a change that happens as a whole or not at all."""
        self._recover()
        savepoint = Savepoint(self._schedule, self.stats, self._events)
        mine = {identity(s.slot) for s in self._schedule.running}
        self._call = Call(savepoint, {identity(s) for s in self.manager.active_slots} - mine)
        try:
            with no_context_mesh():
                result = change()
                self._give_back()
            self._call = None
        except BaseException:
            self._recover()
            raise
        return result

    def _recover(self) -> None:
        """Finishes what an interrupted call has dispatched, or undoes it; may be interrupted and called again."""
        if (call := self._call) is None:
            return
        call.savepoint.restore()
        self._on_device = None
        if is_lost(self.manager, call.results):
            self.manager.reset()
            call.results.clear()
            logging.getLogger(__name__).warning(
                "the cache was lost in a step that failed: %d running samples read their tokens again",
                len(self._schedule.running),
            )
        if call.results:
            self._book(call)
        elif call.plan is not None:
            call.plan.cancel()
            call.plan = None
        there = {identity(slot): slot for slot in self.manager.active_slots}
        for s in list(self._schedule.running):
            if identity(s.slot) not in there or self.manager.length(s.slot) != s.computed:
                self._schedule.restart(s)
                self.stats.restarts += 1
        self._give_back()
        self._call = None

    def _give_back(self) -> None:
        """Releases the slots of the loop that no sample holds."""
        assert self._call is not None
        mine = {identity(s.slot) for s in self._schedule.running}
        for slot in self.manager.active_slots:
            if (this := identity(slot)) not in mine and this not in self._call.others:
                self.manager.release_request(slot)

    # Results.

    def _book_decoded(self, part: Part, chosen: Chosen) -> None:
        s, before = part.sample, part.sample.computed
        missing = part.end - self.manager.length(s.slot)
        if missing > 0:
            self.manager.advance(s.slot, missing)
        s.computed = part.end
        self._take(s, chosen, before)

    def _book_part(self, part: Part, chosen: Chosen) -> None:
        """Books the result of a step for one sample, and for those that fork off it."""
        s, before = part.sample, part.sample.computed
        if part.drafts:
            tokens, accepted = chosen.tokens.tolist(), 0
            while accepted < part.drafts and tokens[accepted] == part.tokens[1 + accepted]:
                accepted += 1
            self.stats.drafted_tokens += part.drafts
            self.stats.accepted_tokens += accepted
            s.computed += 1 + accepted
            if (rejected := self.manager.length(s.slot) - s.computed) > 0:
                self.manager.rollback(s.slot, rejected)
            self._take(s, _part(chosen, np.s_[: 1 + accepted]), before)
            return
        prompt_tokens = len(part.tokens) if s.reading else 0
        self.stats.prefilled_tokens += prompt_tokens
        s.computed = part.end
        if prompt_tokens:  # before others fork off
            self._keep(s, before)
        for i in range(1, part.draws):
            self._fork(s, i, _part(chosen, np.s_[i : i + 1]))
        s.to_fork -= max(part.draws - 1, 0)
        self._take(s, _part(chosen, np.s_[:1]), s.computed if prompt_tokens else before, prompt_tokens)

    def _keep(self, s: Sample, before: int) -> None:
        """Keeps the blocks that became full, for prompts to come: those of the prompt and of what was decoded."""
        size = self.manager.block_size
        if self.manager.prefix_policy is not None and s.computed >= s.found and s.computed // size > before // size:
            self.manager.keep_prefix(s.slot, s.ids[: s.computed], salt=s.request.salt)  # what came after a stop is none

    def _fork(self, parent: Sample, index: int, chosen: Chosen) -> None:
        """Another sample begins where the prompt ends; where blocks are missing for it, it waits."""
        s = self._sample(parent.number, index, parent.request)
        new, finished = s.take(chosen.tokens.tolist())
        if not finished:
            self._schedule.fork(parent, s)
        self._add_event(s, new, chosen, 0, finished)

    def _take(self, s: Sample, chosen: Chosen, before: int, prompt_tokens: int = 0) -> None:
        """Adds tokens to a sample of which the cache held `before`; one that has ended gives back what it holds."""
        new, finished = s.take(chosen.tokens.tolist())
        self._keep(s, before)
        if finished:
            self._schedule.drop(s)
            self._on_device = None
        self._add_event(s, new, chosen, prompt_tokens, finished)

    def _add_event(self, s: Sample, new: list[int], chosen: Chosen, prompt_tokens: int, finished: str | None) -> None:
        cut = np.s_[: len(new)]
        logits = chosen.logits[cut] if chosen.logits is not None and new else None
        probs: LogProbs | None = jax.tree.map(lambda x: x[cut], chosen.log_probs) if new else None
        self._events.append(Event(s.number, s.index, new, logits, probs, prompt_tokens, finished))


def _forms(tree: Any) -> list[tuple[Any, str]]:
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]


def _digest(*what: Any) -> int:
    """31 bits that tell different ones apart."""
    return zlib.crc32(repr(what).encode()) >> 1


def _part(chosen: Chosen, here: Any) -> Chosen:
    return jax.tree.map(lambda x: x[here], chosen)


def _side_by_side(parts: Sequence[T]) -> T:
    """Trees of numpy arrays, one a shard, with their arrays one after the other."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _place(mesh: Any) -> str:
    return "one device" if mesh is None else f"a mesh of {mesh.devices.size} devices"
