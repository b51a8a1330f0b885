"""Every call of the manager, interrupted at every moment and refused by the device at every point: all or nothing.

After it the books are as before the call or as after it, and say what the device holds; the call can be made again.
"""

import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from interrupt import Interrupt
from small_model import SMALL

import dsv4_jax.cache
from dsv4_jax import KVCacheManager, PrefixPolicy
from dsv4_jax.cache.transfer import slots

BLOCK = 12
# At every moment when Python hears signals, instead of the first at every other place in the code.
ALL = bool(os.environ.get("DSV4_INTERRUPT_ALL"))
FOLDER = Path(dsv4_jax.cache.__file__).parent
TEXT = np.random.default_rng(0).integers(0, 64, 61)

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


class World:
    """A manager with two requests, one of them kept for prompts to come, a snapshot, and plans in flight."""

    def __init__(self, policy, prepare):
        self.manager = manager = KVCacheManager(
            SMALL, SMALL.schedule, max_concurrent_requests=5, num_blocks_per_csa_layer=16, num_blocks_per_hca_layer=16,
            max_context_len=96, max_rollback=3, prefix=PrefixPolicy(policy), cache_dtype="fp32",
        )  # fmt: skip
        rng = np.random.default_rng(1)
        self.a, self.b, self.c = manager.admit_request(), manager.admit_request(), manager.admit_request()
        self.feed(self.a, 0, 36)
        state, paged = jax.tree.map(
            lambda x: x if x.dtype == np.int32 else jax.numpy.asarray(rng.normal(size=x.shape), x.dtype),
            (manager.cache.state, manager.cache.paged),
        )
        manager.cache = manager.cache.replace_state(state, paged, manager.cache.block_table)
        manager.keep_prefix(self.a, TEXT[:36])
        self.feed(self.a, 36, 47)
        self.feed(self.b, 0, 60)
        manager.keep_prefix(self.b, TEXT[::-1][:60], salt=b"other")
        self.snapshot = manager.snapshot(self.a, rollback=2)
        self.feed(self.c, 0, 8)
        self.plan = manager.plan_step([self.c] * 9, np.arange(8, 17), num_segments=1, width=BLOCK)
        self.cache = None
        prepare(self)

    def feed(self, slot, start, end):
        for at in range(start, end, BLOCK):
            n = min(BLOCK, end - at)
            plan = self.manager.plan_step([slot] * n, np.arange(at, at + n), num_segments=1, width=BLOCK)
            self.manager.cache = step(self.manager.cache, plan)

    def seen(self):
        """All that the host knows, and what it says the device holds."""
        manager = self.manager
        manager.check()
        # Without the numbers of slots: a call that is made again may take another.
        requests = [(manager.length(s), manager._books.requests.pinned(s)) for s in manager.active_slots]
        written = [s for s in manager.active_slots if s != self.c and not manager._books.requests.pending.involves(s)]
        held = [
            [(name, x.tobytes()) for name, x in manager.snapshot(s).arrays.items()]
            for s in written
            if manager.length(s) >= manager._books.requests._complete_from[s]
        ]
        free = {kind: manager.num_free_blocks(kind) for kind in ("csa", "hca")}
        owned = [{kind: len(ids) for kind, ids in manager.blocks(s).items()} for s in manager.active_slots]
        prefix = manager._books.prefix
        kept = sorted(prefix._nodes), prefix.state_bytes
        return (requests, owned, held, len(manager._books.requests.pending)), free, kept


def plan(world, tokens):
    world.planned = world.manager.plan_step(
        [world.a] * tokens, np.arange(47, 47 + tokens), num_segments=1, width=4 * BLOCK + 1
    )


def make_short(world):
    """Blocks are free only where kept ones are given up."""
    world.plan.cancel()
    world.manager.release_request(world.b)
    world.feed(world.c, 8, 84)


def dispatch(world):
    world.cache = step(world.manager.cache, world.plan)


def assign(world):
    world.manager.cache = world.cache


PREPARE = {"plan_step that evicts": make_short, "cache": dispatch}

CALLS = {
    "plan_step": lambda w: plan(w, 5),
    "plan_step that evicts": lambda w: plan(w, 49),
    "cache": assign,
    "cancel": lambda w: w.plan.cancel(),
    "admit_request": lambda w: w.manager.admit_request(),
    "admit_prompt": lambda w: w.manager.admit_prompt(TEXT[:50]),
    "keep_prefix": lambda w: w.manager.keep_prefix(w.b, TEXT[::-1][:60], salt=b"other"),
    "release_request": lambda w: w.manager.release_request(w.a),
    "release_request of a planned one": lambda w: w.manager.release_request(w.c),
    "rollback": lambda w: w.manager.rollback(w.a, 2),
    "fork": lambda w: w.manager.fork(w.a),
    "snapshot": lambda w: w.manager.snapshot(w.a),
    "restore": lambda w: w.manager.restore(w.snapshot),
    "preempt": lambda w: w.manager.preempt(w.a),
    "advance": lambda w: w.manager.advance(w.b, 1),
    "allocate_block": lambda w: w.manager.allocate_block(1, w.c),
    "length": lambda w: w.manager.length(w.a),
    "num_free_blocks": lambda w: w.manager.num_free_blocks("csa"),
    "reset": lambda w: w.manager.reset(),
}  # fmt: skip

HANDING_OUT = {  # what they return cannot be had again
    "plan_step", "plan_step that evicts", "admit_request", "admit_prompt", "fork", "restore", "preempt",
    "allocate_block",
}  # fmt: skip

DEVICE = [
    (slots, "_enter"), (slots, "_read_rows"), (slots, "_write_slot"), (slots, "_read_blocks"), (slots, "_write_blocks"),
    (dsv4_jax.cache.holder, "copy_slot"),
]  # fmt: skip


def is_lost(manager):
    return any(x.is_deleted() for x in jax.tree.leaves(manager.cache))


def differing(now, *expected):
    """What differs from each of these; empty where one is met."""
    expected = [e for e in expected if e is not None]
    if now in expected:
        return ""
    names = ("requests", "owned", "held", "pending")
    parts = [[n for n, x, y in zip(names, now[0], e[0], strict=True) if x != y] for e in expected]
    return f"{parts}: {now[0][:2], now[0][3], now[1]}, expected {[(e[0][:2], e[0][3], e[1]) for e in expected]}"


def test_every_call_at_every_point(monkeypatch, say):
    points = lost = refused = 0
    for name, call in CALLS.items():
        policy = "zero" if name == "admit_prompt" else "full"
        make = partial(World, policy, PREPARE.get(name, lambda world: None))
        call(make())  # what it compiles is compiled
        world = make()
        before = None if world.cache else world.seen()  # with a step, it is not to be seen
        watch = Interrupt(FOLDER)
        with watch:
            call(world)
        after = world.seen()
        first = {}
        for n, place in enumerate(watch.places, 1):
            first.setdefault(place, n)
        world = make()
        for at in range(1, watch.count + 1) if ALL else sorted(first.values())[len(name) % 2 :: 2]:
            raised = False
            try:
                with Interrupt(FOLDER, at):
                    call(world)
            except KeyboardInterrupt:
                points, raised = points + 1, True
            where = f"{name} interrupted at {watch.places[at - 1]}"
            if world.cache is None and is_lost(world.manager):
                lost += 1
                with pytest.raises(RuntimeError, match="donated"):
                    world.manager.fork(world.b)
                world.manager.reset()
                world.manager.check()
                world = make()
            else:
                if world.cache is not None:
                    call(world)
                now = world.seen()
                # Kept blocks may be given up without what they were given up for.
                wrong = differing(now, before, after)
                assert not wrong or (before and name in PREPARE and now[0] == before[0]), f"{where}: {wrong}"
                lost_result = raised and name in HANDING_OUT and now[0] != before[0]
                assert not lost_result, f"{where}: what it returned is lost"
                if now != before or at % 16 == 0:
                    if now != after:
                        call(world)
                        assert world.seen() == after, f"{where}, and made again"
                    world = make()
        for module, function in DEVICE:
            real = getattr(module, function)
            for n in range(8):
                calls = 0

                def refuse(*args, n=n, real=real):
                    nonlocal calls
                    calls += 1
                    if calls == n + 1:
                        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                    return real(*args)

                world = make()
                with monkeypatch.context() as patch:
                    patch.setattr(module, function, refuse)
                    try:
                        call(world)
                    except RuntimeError:
                        refused += 1
                if calls <= n:
                    break
                if world.cache is not None:
                    call(world)
                now = world.seen()
                assert now in (before, after) or (before and name in PREPARE and now[0] == before[0]), (
                    f"{name}: {function}"
                )
    say(f"{len(CALLS)} calls interrupted at {points} moments, of which {lost} lost the cache; {refused} refused")
    assert points > 500
