"""Who runs and who waits: slots and blocks go to the oldest samples first."""

import bisect

from ..cache.manager import KVCacheManager
from .request import Request, Sample, Stats


def _age(sample: Sample) -> tuple[int, int]:
    return sample.age


class Scheduler:
    """The waiting and the running samples of a loop, oldest first.

    The oldest gets its blocks whatever it takes: where they run out, the youngest gives its own back and waits. What
    one sample needs at most is checked before it is accepted, so the oldest always gets on, and all come to an end.
    """

    def __init__(self, manager: KVCacheManager, lookahead: int, stats: Stats):
        """lookahead: tokens that a running sample brings in one call at most, beside those it has."""
        self.manager, self.lookahead, self.stats = manager, lookahead, stats
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self._schemas = {s.kind: s for s in manager.cache.schemas if s.entries_per_block}

    def check_fits(self, request: Request) -> None:
        """ValueError for a request that could not run even alone."""
        manager = self.manager
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
        while self.waiting and self._has_room(self.waiting[0]):
            sample = self.waiting[0]
            if sample.snapshot is None:
                found = self.manager.admit_prompt(sample.ids, salt=sample.request.salt)
                sample.slot, sample.computed, sample.found = found.slot, found.start, found.hit_tokens
                self.stats.hit_tokens += found.hit_tokens
                self.stats.recomputed_tokens += found.recomputed_tokens
            else:
                sample.slot, sample.snapshot = self.manager.restore(sample.snapshot), None
            del self.waiting[0]
            self._run(sample)
            came = True
        if self.waiting and not self.running:
            raise RuntimeError("slots or blocks of this cache are in use outside the loop: nothing is left to run on")
        return came

    def _has_room(self, sample: Sample) -> bool:
        """Slots for the sample and those that will fork off, blocks for its tokens and for what the others need next.

        Only tokens that are there count: a limit says little about what comes. Of a prompt that begins like earlier
        ones only the blocks count that it does not share.
        """
        manager = self.manager
        free = manager.max_concurrent_requests - len(manager.active_slots) - sum(s.to_fork for s in self.running)
        if free < 1 + sample.to_fork:
            return False
        short = {}
        for kind in self._schemas:
            promised = sum(self._missing(kind, other) for other in self.running)
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
    # the samples are instead cannot be lost any more (`loop.py`).

    def preempt_youngest(self) -> None:
        """Takes the youngest that runs out of the cache; it waits with what it had, in the memory of the host."""
        sample = self.running[-1]
        if sample.computed >= max(sample.found, 1):
            sample.snapshot = self.manager.snapshot(sample.slot)
        else:
            sample.computed = 0  # nothing was there yet, or nothing that is complete: it is admitted once more
        self.stats.preemptions += 1
        self.drop(sample)
        self.wait(sample)

    def fork(self, parent: Sample, sample: Sample) -> None:
        """Lets `sample` go on from what the cache holds of `parent`; where blocks are missing for that, it waits."""
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
