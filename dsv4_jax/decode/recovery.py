"""What makes a call of the loop happen as a whole or not at all, whatever interrupts it, Ctrl-C included.

A call changes three things: the samples on the host, slots and blocks of the manager, and the cache on the device. The
samples are put back to a savepoint. Slots that no sample holds are given back. The device is beyond undoing: once the
jitted step has returned its results, the call is finished from these instead; where it took the cache and returned
nothing, the cache is made anew and the samples read their tokens again.
"""

from dataclasses import dataclass, field
from typing import Any

import jax

from ..cache.host.slot import Slot
from ..cache.manager import KVCacheManager
from ..cache.sharded_manager import ShardedKVCacheManager
from .draft import PromptLookup
from .layout import Part
from .request import Event, Stats
from .scheduler import Scheduler


class Savepoint:
    """The samples, statistics and events of a loop as they are when it is made."""

    def __init__(self, scheduler: Scheduler, stats: Stats, events: list[Event]):
        self._scheduler, self._stats, self._events = scheduler, stats, events
        self._waiting, self._running = list(scheduler.waiting), list(scheduler.running)
        # Of those that wait, a call changes only the first, which it admits.
        first = self._waiting[: scheduler.manager.max_concurrent_requests]
        self._fields = [(s, dict(vars(s)), len(s.ids)) for s in (*first, *self._running)]
        self._counts, self._num_events = dict(vars(stats)), len(events)
        self._submitted = scheduler.submitted

    def restore(self) -> None:
        """Puts everything back; may be interrupted and called again."""
        for sample, fields, length in self._fields:
            del sample.ids[length:]
            vars(sample).update(fields)
            if sample.lookup is not None:
                sample.lookup = PromptLookup(sample.ids)
        self._scheduler.waiting[:], self._scheduler.running[:] = self._waiting, self._running
        self._scheduler.submitted = self._submitted
        vars(self._stats).update(self._counts)
        del self._events[self._num_events :]


@dataclass
class Call:
    """A call that is under way."""

    savepoint: Savepoint
    others: set[tuple[int, int]]  # slots in use that are none of the loop's
    parts: list[Part] = field(default_factory=list)  # the tokens of each sample in the step
    plan: Any = None  # of the step, until it is dispatched
    given: Any = None  # the cache that the step takes
    results: list[tuple] = field(default_factory=list)  # of the jitted step, one tuple, the cache last


def identity(slot: Any) -> tuple[int, int]:
    """Tells the requests of one slot apart."""
    return int(slot), slot.generation if isinstance(slot, Slot) else -1


def is_lost(manager: KVCacheManager | ShardedKVCacheManager, results: list[tuple]) -> bool:
    """Whether the cache went with a step that failed: donated and not returned, or returned by a step that failed."""
    try:
        jax.block_until_ready([result[:-1] for result in results])
    except Exception:  # whatever the device says; Ctrl-C is none
        return True
    return not results and any(x.is_deleted() for x in jax.tree.leaves(manager.cache))
