"""Who runs and who waits: slots and blocks go to the oldest samples first."""

import bisect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ..cache.manager import KVCacheManager
from ..cache.new_blocks import NewBlocks
from ..cache.sharded_manager import ShardedKVCacheManager
from .layout import Part
from .request import Request, Sample, Stats


def _age(sample: Sample) -> tuple[int, int]:
    return sample.age


class Scheduler:
    """The waiting and the running samples of a loop, oldest first.

    The oldest always gets its blocks: where they run out, the youngest releases its own and waits. What one sample
    needs at most is checked before it is accepted, so the oldest makes progress in every call, and all finish.

    Attributes:
      shards: the managers of the shards, or the one manager.
    """

    def __init__(self, manager: KVCacheManager | ShardedKVCacheManager, lookahead: int, stats: Stats):
        """lookahead: tokens of a running sample in one call at most, beyond those it has."""
        self.manager, self.lookahead, self.stats = manager, lookahead, stats
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.submitted = 0  # requests so far: the number of the next
        self.shards = manager.shards if isinstance(manager, ShardedKVCacheManager) else (manager,)
        self._schemas = {s.kind: s for s in self.shards[0].cache.schemas if s.entries_per_block}

    @property
    def slots_per_shard(self) -> int:
        """Slots of each shard."""
        return self.shards[0].max_concurrent_requests

    def shard_of(self, sample: Sample) -> int:
        """The shard on which a sample runs."""
        return int(sample.slot) // self.slots_per_shard

    def on(self, shard: int) -> list[Sample]:
        """Those that run on a shard, oldest first."""
        return [s for s in self.running if self.shard_of(s) == shard]

    def no_blocks(self, rows: int) -> NewBlocks:
        """What a step of no plan enters, `rows` of padding of each kind and shard, the shards' one after the other."""
        none = NewBlocks.none(tuple(self.shards[0].cache.block_table), rows)
        return replace(none, rows=np.concatenate([none.rows] * len(self.shards)))

    def by_shard(self, parts: Iterable[Part]) -> list[list[Part]]:
        """The parts of a step that each shard has, in their order."""
        own: list[list[Part]] = [[] for _ in self.shards]
        for part in parts:
            own[self.shard_of(part.sample)].append(part)
        return own

    def check_fits(self, request: Request) -> None:
        """ValueError for a request that could not run even alone."""
        manager = self.shards[0]  # a request and its samples are on one
        if request.limit > manager.max_context_len:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_new_tokens} shall follow: a request of "
                f"this cache has at most {manager.max_context_len} (max_context_len)"
            )
        if request.num_samples > manager.max_concurrent_requests:
            raise ValueError(
                f"num_samples is {request.num_samples}: this cache has {manager.max_concurrent_requests} slots "
                "(max_concurrent_requests)"
            )
        for kind, schema in self._schemas.items():
            # The last token is never written.
            needed, there = schema.blocks_for(request.limit - 1), manager.cache.paged[kind].num_blocks
            if needed > there:
                raise ValueError(
                    f"{request.limit} tokens need {needed} {kind.upper()} blocks: this cache has {there} "
                    f"(num_blocks_per_{kind}_layer)"
                )

    def wait(self, sample: Sample) -> None:
        """Puts a sample in its place among the waiting."""
        bisect.insort(self.waiting, sample, key=_age)

    def admit(self) -> bool:
        """Lets the oldest that wait run, as long as there are slots and blocks -> whether anybody came in.

        Nobody overtakes: where the first has to wait, so do the others.
        """
        came = False
        while self.waiting and (shard := self._find_room(self.waiting[0])) is not None:
            sample = self.waiting[0]
            here: dict[str, Any] = {"shard": shard} if len(self.shards) > 1 else {}
            if sample.snapshot is None:
                found = self.manager.admit_prompt(sample.ids, salt=sample.request.salt, **here)
                sample.slot, sample.computed, sample.found = found.slot, found.start, found.hit_tokens
                self.stats.hit_tokens += found.hit_tokens
                self.stats.recomputed_tokens += found.recomputed_tokens
            else:
                sample.slot, sample.snapshot = self.manager.restore(sample.snapshot, **here), None
            del self.waiting[0]
            self._run(sample)
            came = True
        if self.waiting and not self.running:
            raise RuntimeError("slots or blocks of this cache are in use outside the loop: nothing is left to run on")
        return came

    def _find_room(self, sample: Sample) -> int | None:
        """The shard where a sample may begin; None where it has to wait.

        The longest prefix hit comes first, then the fewest tokens to read, then the fewest samples.
        """
        if len(self.shards) == 1:
            return 0 if self._has_room(sample, 0) else None
        found = [0] * len(self.shards)
        if sample.snapshot is None:
            found = [shard.found_tokens(sample.ids, salt=sample.request.salt) for shard in self.shards]

        def load(shard: int) -> tuple[int, int, int]:
            own = self.on(shard)
            return -found[shard], sum(s.pending for s in own if s.reading), len(own)

        order = sorted(range(len(self.shards)), key=load)
        return next((shard for shard in order if self._has_room(sample, shard)), None)

    def _has_room(self, sample: Sample, shard: int) -> bool:
        """Slots for the sample and those that will fork off, blocks for its tokens and for what the others need next.

        Only tokens that are there count: a limit says little about what comes. Of a prompt that begins like earlier
        ones only the blocks count that it does not share.
        """
        manager, running = self.shards[shard], self.on(shard)
        free = manager.max_concurrent_requests - len(manager.active_slots) - sum(s.to_fork for s in running)
        if free < 1 + sample.to_fork:
            return False
        short = {}
        for kind in self._schemas:
            promised = sum(self._missing(kind, other) for other in running)
            short[kind] = self._missing(kind, sample) + promised - manager.num_free_blocks(kind)
        if max(short.values(), default=0) <= 0:
            return True
        if sample.snapshot is not None or manager.prefix_policy is None:
            return False
        shared = manager.shareable_blocks(sample.ids, salt=sample.request.salt)
        return all(n <= shared[kind] for kind, n in short.items())

    def _missing(self, kind: str, sample: Sample) -> int:
        """Blocks that a sample lacks for its tokens and those of one more call."""
        needed = self._schemas[kind].blocks_for(min(len(sample.ids) + self.lookahead, sample.request.limit) - 1)
        return max(needed - (0 if sample.slot < 0 else len(self.manager.blocks(sample.slot)[kind])), 0)

    # Whoever leaves the cache only forgets its slot here: the loop gives back the slots that no sample holds, once what
    # the samples are instead can no longer be lost (`loop.py`).

    def preempt_youngest(self, shard: int = 0) -> None:
        """Takes the youngest that runs on a shard out of the cache; it waits with what it had, in the host's memory."""
        sample = self.on(shard)[-1]
        if sample.computed >= max(sample.found, 1):
            sample.snapshot = self.manager.snapshot(sample.slot)
        else:
            sample.computed = 0  # nothing was there yet, or nothing that is complete: it is admitted once more
        self.stats.preemptions += 1
        self.drop(sample)
        self.wait(sample)

    def fork(self, parent: Sample, sample: Sample) -> None:
        """Lets `sample` continue from what the cache holds of `parent`; where blocks are missing for that, it waits."""
        sample.computed = parent.computed
        try:
            sample.slot = self.manager.fork(parent.slot)
        except RuntimeError:
            sample.snapshot = self.manager.snapshot(parent.slot)
            self.wait(sample)
        else:
            self._run(sample)

    def restart(self, sample: Sample) -> None:
        """A sample whose part of the cache is gone waits, to read its tokens again."""
        self.running.remove(sample)
        sample.start_again()
        self.wait(sample)

    def _run(self, sample: Sample) -> None:
        bisect.insort(self.running, sample, key=_age)

    def drop(self, sample: Sample) -> None:
        """Takes a sample out."""
        (self.waiting if sample.slot < 0 else self.running).remove(sample)
        sample.slot = -1
