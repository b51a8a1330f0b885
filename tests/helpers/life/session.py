"""Moves on a cache whose every promise is checked after each: the reference is a list of tokens per request."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupt import Interrupt
from life.worlds import World

import dsv4_jax.cache
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.transfer.snapshot import Snapshot

KINDS = ("csa", "hca")

COPIES: list[Callable[[StepPlan], StepPlan]] = [
    jax.device_put,
    lambda plan: jax.tree.map(jnp.asarray, plan),
    lambda plan: dataclasses.replace(plan),
    copy.deepcopy,
]
FOLDER = Path(dsv4_jax.cache.__file__).parent


class Session:
    """A manager, and beside it nothing but the tokens of every request: the text it will have, and its length so far.

    A move does something to both, or is refused and changes nothing; which of the two is known before. After every
    move everything the cache shows is compared with what the tokens say. `moves` counts those that did or refused
    something.
    """

    def __init__(self, world: World, *, slots: int = 4, blocks: int = 8, **options: Any):
        self.world, self.slots, self.num_blocks = world, slots, blocks
        self.config, self.limit, self.width = world.fill.config, world.fill.length, world.fill.width
        self.manager = self.new_manager(**options)
        for manager in getattr(self.manager, "shards", (self.manager,)):
            if world.reach is not None and manager._books.prefix is not None:
                manager._books.prefix._reach = world.reach
        self.texts = np.zeros((slots, self.limit), np.int32)
        self.expected: Any = None  # of the world: what the texts give
        self.looked_at: Any = None  # of the world: what was compared with that last
        self.lengths: dict[int, int] = {}
        self.floors: dict[int, int] = {}  # the length that a request can go back to
        self.restored: dict[int, int] = {}  # the length that a restored request could go back to at first
        self.complete: dict[int, int] = {}  # of a hit of the policy "zero", up to where it is computed again
        self.kept: list[np.ndarray] = []  # the beginnings of texts that were kept for others
        self.shelf: list[tuple[Snapshot, np.ndarray]] = []  # snapshots and their texts
        self.stale: list[int] = []  # handles of requests that ended
        self.moves = self.hits = self.lost = 0

    def new_manager(self, **options: Any) -> Any:
        """The manager of the session."""
        return self.world.fill.new_manager(slots=self.slots, blocks=self.num_blocks, **options)

    # Moves. A number that says which slot means the one of that rank among the running ones.

    def admit(self, seed: int) -> None:
        """A request without tokens, or a refusal when every slot is taken."""
        if len(self.lengths) == self.slots:
            self._refused(self.manager.admit_request, RuntimeError)
            return
        slot = self.manager.admit_request()
        assert slot not in self.lengths
        self.lengths[slot] = self.floors[slot] = 0
        self._go_on_with(slot, seed)
        self._done()

    def release(self, which: int) -> None:
        """Ends a request, wherever it stands."""
        if (slot := self._slot(which)) is None:
            return
        self.stale.append(next(s for s in self.manager.active_slots if s == slot))
        self.manager.release_request(slot)
        self._forget(slot)
        self._done()

    def snapshot(self, which: int, back: int, seed: int) -> None:
        """Puts a request on the shelf, with what it takes to go back; it goes on, or makes room."""
        if (slot := self._slot(which)) is None:
            return
        manager, length = self.manager, self.lengths[slot]
        if self._is_incomplete(slot):
            self._refused(lambda: manager.snapshot(slot), ValueError)
            return
        if back > length - self.floors[slot]:
            self._refused(lambda: manager.snapshot(slot, rollback=back), ValueError)
            return
        self.shelf = self.shelf[-2:]
        text = self.texts[slot].copy()
        if seed % 2:
            self.shelf.append((manager.snapshot(slot, rollback=back), text))
        else:
            self.stale.append(next(s for s in manager.active_slots if s == slot))
            self.shelf.append((manager.preempt(slot, rollback=back), text))
            self._forget(slot)
        assert self.shelf[-1][0].length == length
        self._done()

    def restore(self, which: int, seed: int) -> None:
        """A request from the shelf goes on, with other tokens; or a refusal for want of a slot or blocks."""
        if not self.shelf:
            return
        snapshot, text = self.shelf[which % len(self.shelf)]
        if not self._fits(snapshot.length):
            self._refused(lambda: self.manager.restore(snapshot), RuntimeError)
            return
        slot = self.manager.restore(snapshot)
        assert slot not in self.lengths
        self.texts[slot], self.lengths[slot] = text, snapshot.length
        self.floors[slot] = snapshot.length - min(snapshot.rollback, self.manager.max_rollback)
        self.restored[slot] = self.floors[slot]
        self._go_on_with(slot, seed)
        self._done()

    def keep(self, which: int) -> None:
        """Keeps the full blocks of a request for prompts to come; it cannot go back into them any more."""
        if (slot := self._slot(which)) is None:
            return
        text = self.texts[slot, : self.lengths[slot]].copy()
        if self._is_incomplete(slot):
            self._refused(lambda: self.manager.keep_prefix(slot, text), ValueError)
            return
        n = self.manager.keep_prefix(slot, text)
        assert n in (0, len(text) // self.config.block_size * self.config.block_size)
        self.floors[slot] = max(self.floors[slot], n)
        if n:
            self.kept = [*self.kept[-2:], text[:n]]
        self._done()

    def admit_like(self, which: int, length: int, change: int, seed: int) -> None:
        """A prompt that begins like a kept one, if `change` is not 0 with another token there; or a refusal."""
        if not self.kept:
            return
        kept = self.kept[which % len(self.kept)]
        text = np.random.default_rng(seed).integers(0, self.config.vocab_size, self.limit).astype(np.int32)
        text[: len(kept)] = kept
        if change:
            text[change % len(kept)] += 1 - 2 * (text[change % len(kept)] > 0)
        prompt = text[: max(min(length, self.limit), 1)]
        if len(self.lengths) == self.slots:
            self._refused(lambda: self.manager.admit_prompt(prompt), RuntimeError)
            return
        slot, start, hit, again = self.manager.admit_prompt(prompt)
        assert slot not in self.lengths
        assert hit - again == start < len(prompt)
        assert start % self.config.block_size == 0
        self.texts[slot] = text
        self.lengths[slot] = self.floors[slot] = self.restored[slot] = start
        if hit > start and self.manager.prefix_policy.name == "zero":
            self.floors[slot] = self.complete[slot] = hit
        self.hits += start > 0
        self.world.renew(self, slot)
        self._done()

    def share(self, which: int, change: int, seed: int) -> None:
        """A request comes to the end of a block, which is kept, and another begins like it; both go on."""
        if (slot := self._slot(which)) is None:
            return
        if len(self.lengths) == self.slots:
            self.release(which + 1)
        end = self._keep_block(slot, -self.lengths[slot] % self.config.block_size, seed)
        if change and end:
            # The same blocks after another beginning are other blocks: kept under it, they are found only after it.
            before = set(self.lengths)
            self.admit_like(-1, self.limit, min(change, end - 1), seed)
            for other in set(self.lengths) - before:
                while (left := end - self.lengths[other]) > 0 and self._keep_block(other, min(left, 12), seed):
                    pass
                self.release(self._rank(other))
        self.admit_like(-1, self.limit, 0, seed + 1)
        self.decode((True,) * self.slots, seed)

    def _keep_block(self, slot: int, n: int, seed: int) -> int:
        """Brings n tokens of a slot and keeps its blocks -> its length; 0 where the blocks did not suffice."""
        end = self.lengths[slot] + n
        self.chunk(tuple(n * (s == slot) for s in range(self.slots)), seed)
        if self.lengths[slot] != end:
            return 0
        self.keep(self._rank(slot))
        return end

    def chunk(self, counts: tuple[int, ...], seed: int) -> None:
        """counts[slot] tokens for every running request in one step, in any order, with padding anywhere."""
        new = {s: min(counts[s], self.limit - n) for s, n in self.lengths.items()}
        self._step(new, self.slots * self.width, seed, num_segments=self.slots, width=self.width)

    def decode(self, who: tuple[bool, ...], seed: int) -> None:
        """One token for the requests of `who`, each in any row."""
        self._step({s: int(who[s] and n < self.limit) for s, n in self.lengths.items()}, self.slots, seed)

    def interrupted(self, counts: tuple[int, ...], which: int, seed: int) -> None:
        """Between the plan of a chunk and its dispatch one of its requests ends or goes back, and another begins."""
        if (slot := self._slot(which)) is None or self.lengths[slot] == self.limit or self._is_incomplete(slot):
            return
        new = {s: min(counts[s], self.limit - n) for s, n in self.lengths.items()}
        new[slot] = max(new[slot], 1)
        planned = self._plan(new, self.slots * self.width, seed, num_segments=self.slots, width=self.width)
        if planned is None:
            return
        handle, brought = next(s for s in self.manager.active_slots if s == slot), new[slot]
        written = {**self.lengths, **{s: self.lengths[s] + n for s, n in new.items()}}
        back = min(brought, self.manager.max_rollback)
        with pytest.raises(ValueError, match="planned step"):
            self.manager.fork(slot)
        if seed % 2:
            self.manager.release_request(handle)
        else:
            self.manager.rollback(handle, back)
        newcomer = None
        if len(self.lengths) < self.slots:
            newcomer = self.manager.admit_request()
            assert newcomer not in self.lengths
        self.world.step(self, planned)
        self.lengths = written
        if seed % 2:
            self._forget(slot)
            self.stale.append(handle)
        else:
            self._settle(slot)
            self.lengths[slot] -= back
            self._go_on_with(slot, seed)
        if newcomer is not None:
            self.lengths[newcomer] = self.floors[newcomer] = 0
            self._go_on_with(newcomer, seed)
        self._done()

    # What users do that are not polite.

    def not_run(self, counts: tuple[int, ...], seed: int) -> None:
        """A chunk is planned, perhaps copied, and then cancelled or dropped: nothing has changed."""
        before = self.book()
        planned = self._plan(
            self._new(counts), self.slots * self.width, seed, num_segments=self.slots, width=self.width
        )
        if planned is None:
            return
        if seed % 2:
            planned = COPIES[seed // 2 % len(COPIES)](planned)
        if seed % 2 or seed // 16 % 2:  # Python may hold on to arrays that were copied for a while
            planned.cancel()
            planned.cancel()
        del planned
        assert self.book() == before
        self._done()

    def copied(self, counts: tuple[int, ...], which: int, seed: int) -> None:
        """A copy of a plan is dispatched, the plan being gone; a request of it may end meanwhile, and others begin."""
        planned = self._plan(
            self._new(counts), self.slots * self.width, seed, num_segments=self.slots, width=self.width
        )
        if planned is None:
            return
        planned = COPIES[seed % len(COPIES)](planned)
        ended = self._slot(which) if seed // 8 % 2 else None
        written = {s: n + self._new(counts)[s] for s, n in self.lengths.items()}
        if ended is not None:
            self.stale.append(next(s for s in self.manager.active_slots if s == ended))
            self.manager.release_request(ended)
        newcomers = []
        while len(self.lengths) + len(newcomers) < self.slots and seed // 16 % 2:
            newcomers.append(self.manager.admit_request())
            assert newcomers[-1] not in self.lengths
        self.world.step(self, planned)
        if seed // 32 % 2 and ended is None and max(self._new(counts).values()) <= self.manager.max_rollback:
            self.world.step(self, planned)  # the newest tokens may be written again
        self.lengths = written
        if ended is not None:
            self._forget(ended)
        for newcomer in newcomers:
            self.lengths[newcomer] = self.floors[newcomer] = 0
            self._go_on_with(newcomer, seed)
        del planned
        self._done()

    def two_in_flight(self, counts: tuple[int, ...], seed: int) -> None:
        """Two plans of different requests, dispatched in either order; one of them, or both, may never run."""
        parts = [{s: n * (s % 2 == i) for s, n in self._new(counts).items()} for i in (0, 1)]
        if not self._room({s: self.lengths[s] + n for part in parts for s, n in part.items() if n}):
            return
        plans = []
        for i, part in enumerate(parts):
            try:
                plans.append(self._plan_chunk(part, seed))
            except RuntimeError:  # kept blocks are given out only while no plan is outstanding
                assert plans[0] is not None
                assert self.kept
                plans.append(None)
                parts[i] = dict.fromkeys(part, 0)
            for slot, n in parts[i].items():
                self.lengths[slot] += n
        for i in (1, 0) if seed % 2 else (0, 1):
            if plans[i] is None:
                continue
            if seed // 2 % 4 == i:
                plans[i] = None  # dropped
                for slot, n in parts[i].items():
                    self.lengths[slot] -= n
            else:
                self.world.step(self, plans[i])
        self._done()

    def broken_off(self, which: int, at: int, seed: int) -> None:
        """A call of the manager is interrupted at the at-th moment of hearing signals: all counts, or nothing."""
        if (slot := self._slot(which)) is None:
            return
        manager, before = self.manager, self.book()
        calls: list[Callable[[], Any]] = [
            lambda: manager.plan_step([slot], [self.lengths[slot]]),
            lambda: manager.plan_step(
                [slot] * 12, self.lengths[slot] + np.arange(12), num_segments=4, width=self.width
            ),
            manager.admit_request,
            lambda: manager.fork(slot),
            lambda: manager.snapshot(slot),
            lambda: manager.rollback(slot, 0),
            lambda: manager.num_free_blocks("csa"),
            lambda: manager.restore(self.shelf[0][0]) if self.shelf else manager.length(slot),
        ]
        try:
            with Interrupt(FOLDER, at):
                calls[seed % len(calls)]()
        except (KeyboardInterrupt, ValueError, RuntimeError):
            pass
        if any(x.is_deleted() for x in jax.tree.leaves(manager.cache)):  # a step on the device took it, and is lost
            manager.reset()
            self.lengths, self.floors, self.restored, self.complete, self.kept, self.stale = {}, {}, {}, {}, [], []
            self.lost += 1
        else:
            for new in set(manager.active_slots) - set(self.lengths):
                manager.release_request(new)
            assert self.book() == before
        self._done()

    def _plan_chunk(self, new: dict[int, int], seed: int) -> StepPlan | None:
        return self._plan(new, self.slots * self.width, seed, num_segments=self.slots, width=self.width)

    def _new(self, counts: tuple[int, ...]) -> dict[int, int]:
        return {s: min(counts[s], self.limit - n) for s, n in self.lengths.items()}

    def branch(self, which: int, n: int, seed: int) -> None:
        """A request goes back, then forks (another makes room if need be), one of the two goes back, both go on."""
        if (slot := self._slot(which)) is None:
            return
        if len(self.lengths) == self.slots:
            self.release(which + 1)
        self.rollback(self._rank(slot), seed // 2 % (self.manager.max_rollback + 1), seed)
        before = set(self.lengths)
        self.fork(self._rank(slot), seed)
        child = next(iter(set(self.lengths) - before), slot)
        self.rollback(self._rank(child if seed % 2 else slot), n, seed + 1)
        self.chunk(tuple(self.width * (s in (slot, child)) for s in range(self.slots)), seed)

    def burst(self, steps: int) -> None:
        """Several decode steps of all requests after one plan, as a jitted loop takes them."""
        running = [s for s, n in self.lengths.items() if n + steps <= self.limit and not self._is_incomplete(s)]
        if not running:
            return
        slots, positions = self._tokens(dict.fromkeys(running, 1), self.slots, None)

        def plan():
            return self.manager.plan_step(slots, positions, lookahead=steps - 1)

        if not self._room({s: self.lengths[s] + steps for s in running}):
            self._refused(plan, RuntimeError)
            return
        planned = plan()
        for i in range(steps):
            part = planned if i == 0 else StepPlan(planned.slots, positions + np.int32(i), None, _no_blocks(planned))
            self.world.step(self, part)
        for slot in running:
            self.lengths[slot] += steps
            self.manager.advance(slot, steps - 1)
        self._done()

    def rollback(self, which: int, n: int, seed: int) -> None:
        """Forgets n tokens, other ones will follow; or a refusal where so many cannot be forgotten."""
        if (slot := self._slot(which)) is None:
            return
        if n and self.lengths[slot] - n < self.floors[slot]:
            self._refused(lambda: self.manager.rollback(slot, n), ValueError)
            return
        self.manager.rollback(slot, n)
        self.lengths[slot] -= n
        if not self._is_incomplete(slot):
            self._go_on_with(slot, seed)
        self._done()

    def fork(self, which: int, seed: int) -> None:
        """A second request with the same tokens, or a refusal for want of a slot or blocks."""
        if (slot := self._slot(which)) is None:
            return
        if self._is_incomplete(slot):
            self._refused(lambda: self.manager.fork(slot), ValueError)
            return
        before = self.book()
        try:
            child = self.manager.fork(slot)
        except RuntimeError:
            assert self.book() == before
            assert not self._fits_beside(slot), "a fork was refused that would have fitted"
        else:
            assert child not in self.lengths
            self.texts[child] = self.texts[slot]
            self.lengths[child], self.floors[child] = self.lengths[slot], self.floors[slot]
            self.restored[child] = self.restored.get(slot, -1)
            self._go_on_with(child, seed)
        self._done()

    def poison(self) -> None:
        """NaN in every block and every slot that nobody owns."""
        free = {kind: np.zeros(self.num_blocks, bool) for kind in KINDS}
        for kind in KINDS:  # blocks that are kept for prompts to come count as free, and hold something
            free[kind][self.manager._books.ledger.free_blocks(kind)] = True
        dead = np.array([s not in self.lengths for s in range(self.slots)])
        self.manager.cache = fill_with_nan(self.manager.cache, free, dead)
        self._done()

    def mistake(self, which: int, seed: int) -> None:
        """A call that makes no sense: refused, and nothing changed."""
        manager, rng = self.manager, np.random.default_rng(seed)
        nobody = next((s for s in range(self.slots + 1) if s not in self.lengths), -1)
        calls: list[Callable[[], Any]] = [
            lambda: manager.release_request(nobody),
            lambda: manager.fork(nobody),
            lambda: manager.rollback(nobody, 1),
            lambda: manager.plan_step([nobody if nobody >= 0 else -2], [0]),
        ]
        if self.stale:
            old = self.stale[rng.integers(len(self.stale))]
            calls += [lambda: manager.release_request(old), lambda: manager.plan_step([old], [0])]
        if (slot := self._slot(which)) is not None:
            n = self.lengths[slot]
            calls += [
                lambda: manager.plan_step([slot], [self.limit]),
                lambda: manager.plan_step([slot, slot], [n, n]),
                lambda: manager.plan_step([slot, slot], [n, n + 2]),
                lambda: manager.plan_step([slot], [n - 1]),
                lambda: manager.plan_step([slot], [n + 1]),
                lambda: manager.rollback(slot, -1),
                lambda: manager.rollback(slot, n + 1),
            ]
        self._refused(calls[rng.integers(len(calls))], ValueError)

    def end(self) -> None:
        """Everybody leaves: nothing is left behind."""
        for slot in self.lengths:
            self.manager.release_request(slot)
        self.lengths.clear()
        self.manager.check()
        for kind in KINDS:
            assert self.manager.num_free_blocks(kind) == self.num_blocks
        assert not self.manager.active_slots

    # What they share.

    def book(self) -> tuple:
        """All that the host knows, and the block tables."""
        manager = self.manager
        tables = {k: np.asarray(t).tolist() for k, t in manager.cache.block_table.items()}
        free = {k: manager.num_free_blocks(k) for k in tables}
        return (
            manager.active_slots,
            free,
            tables,
            [(manager.length(s), manager.blocks(s)) for s in manager.active_slots],
        )

    def _slot(self, which: int) -> int | None:
        running = sorted(self.lengths)
        return running[which % len(running)] if running else None

    def _is_incomplete(self, slot: int) -> bool:
        """Whether a prefix hit is still being computed again."""
        return self.lengths[slot] < self.complete.get(slot, 0)

    def _rank(self, slot: int) -> int:
        return sorted(self.lengths).index(slot)

    def _free(self, kind: str) -> int:
        return self.num_blocks - len({b for s in self.lengths for b in self.manager.blocks(s)[kind]})

    def _room(self, ends: dict[int, int]) -> bool:
        """Whether the free blocks suffice for requests of so many tokens."""
        needed = dict.fromkeys(KINDS, 0)
        for slot, end in ends.items():
            for kind, blocks in self._blocks_for(end).items():
                needed[kind] += max(blocks - len(self.manager.blocks(slot)[kind]), 0)
        return all(n <= self._free(kind) for kind, n in needed.items())

    def _blocks_for(self, length: int) -> dict[str, int]:
        """Blocks that the closed windows of so many tokens touch."""
        ratios = {"csa": self.config.csa_ratio, "hca": self.config.hca_ratio}
        return {kind: -(-(length // ratio * ratio) // self.config.block_size) for kind, ratio in ratios.items()}

    def _forget(self, slot: int) -> None:
        del self.lengths[slot], self.floors[slot]
        self.restored.pop(slot, None)
        self.complete.pop(slot, None)

    def _settle(self, slot: int) -> None:
        """What lies further back than the slack can no more be gone back to."""
        self.floors[slot] = max(self.floors[slot], self.lengths[slot] - self.manager.max_rollback)

    def _go_on_with(self, slot: int, seed: int) -> None:
        """Draws what follows the tokens that the request has."""
        rest = np.random.default_rng(seed).integers(0, self.config.vocab_size, self.limit - self.lengths[slot])
        self.texts[slot, self.lengths[slot] :] = rest
        self.world.renew(self, slot)

    def _step(self, new: dict[int, int], total: int, seed: int, **shape: int) -> None:
        """A step of `total` tokens, new[slot] of them for each slot."""
        planned = self._plan(new, total, seed, **shape)
        if planned is None:
            return
        self.world.step(self, planned)
        for slot, n in new.items():
            self.lengths[slot] += n
        self._done()

    def _plan(self, new: dict[int, int], total: int, seed: int, **shape: int) -> StepPlan | None:
        """Tokens in any order, padding anywhere; None where there are none, or after a refusal for want of blocks."""
        if not sum(new.values()):
            return None
        slots, positions = self._tokens(new, total, seed)

        def plan():
            return self.manager.plan_step(slots, positions, **shape)

        if not self._room({s: self.lengths[s] + n for s, n in new.items() if n}):
            self._refused(plan, RuntimeError)
            return None
        return plan()

    def _tokens(self, new: dict[int, int], total: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Slots and positions (total,) of new[slot] tokens each, in any order and at any place if there is a seed."""
        slots, positions = np.full(total, -1, np.int32), np.zeros(total, np.int32)
        place = np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total)
        place = place[: sum(new.values())]
        slots[place] = [s for s, n in new.items() for _ in range(n)]
        positions[place] = [self.lengths[s] + i for s, n in new.items() for i in range(n)]
        return slots, positions

    def _fits(self, length: int) -> bool:
        """Whether there is a slot and blocks for a request of so many tokens."""
        room = all(n <= self._free(kind) for kind, n in self._blocks_for(length).items())
        return len(self.lengths) < self.slots and room

    def _fits_beside(self, slot: int) -> bool:
        """Whether there is a slot and, shared ones not considered, blocks for another request like this one."""
        room = all(len(ids) <= self._free(kind) for kind, ids in self.manager.blocks(slot).items())
        return len(self.lengths) < self.slots and room

    def _refused(self, call: Callable[[], Any], error: type[Exception]) -> None:
        before = self.book()
        with pytest.raises(error):
            call()
        assert self.book() == before, "a refused call changed something"
        self._done()

    def _done(self) -> None:
        self.moves += 1
        manager = self.manager
        assert manager.active_slots == sorted(self.lengths)
        for slot, n in self.lengths.items():
            self._settle(slot)
            assert manager.length(slot) == n, f"slot {slot}: length {manager.length(slot)}, not {n}"
        manager.check()
        self.world.check(self)


def _no_blocks(plan: StepPlan) -> dict[str, np.ndarray]:
    return {kind: np.full_like(rows, -1) for kind, rows in plan.new_blocks.items()}


@jax.jit
def fill_with_nan(cache: KVCache, free: dict[str, jax.Array], dead: jax.Array) -> KVCache:
    """NaN bits in the pools' free blocks (N,) bool by kind and in the rings and tails of dead slots (R,) bool."""

    def fill(x: jax.Array, chosen: jax.Array) -> jax.Array:
        if x.dtype == jnp.int32:  # positions that rows were written for: they may be anything
            return x
        chosen = chosen.reshape((1, -1) + (1,) * (x.ndim - 2))
        return jnp.where(chosen, jnp.full((), 0x7F if x.dtype == jnp.uint8 else jnp.nan, x.dtype), x)

    paged = {kind: jax.tree.map(lambda x, f=free[kind]: fill(x, f), pool) for kind, pool in cache.paged.items()}
    state = jax.tree.map(lambda x: fill(x, dead), cache.state)
    return cache.replace_state(state, paged, cache.block_table)
