"""handle.select through the lives of requests: slots and blocks change hands, and every choice is of one's own keys."""

from functools import partial

import jax
import numpy as np
import pytest

from dsv4_jax import CacheGeometry, KVCacheManager, LayerCacheHandle
from dsv4_jax.cache import handle as module
from dsv4_jax.ops.formats.fp4 import hadamard_matrix
from dsv4_jax.ops.read.select import select
from dsv4_jax.ops.write.compress import CompressorWeights

GEOMETRY = CacheGeometry(
    layers=("csa",), head_dim=512, rope_dim=64, window=128, index_head_dim=128, csa_ratio=4, hca_ratio=128
)
LENGTH, SLOTS, ROLLBACK, K, HEADS = 256, 4, 5, 6, 4
DECODE, CHUNK, WIDTH = 6, 90, 30  # rows of a decode step; of one that brings more, WIDTH at most of a slot
ERROR = {"cuda": 2e-3}  # of a score, relative to the largest of its token; else 1e-5


@pytest.fixture
def implementation(implementation, monkeypatch):
    monkeypatch.setattr(module, "select", partial(select, implementation=implementation))
    return implementation


def is_right(chosen, keys, q, weights, error):
    """Whether `chosen` (K,) are the best of one's keys (E, 128), NaN before all and then by index; q (HEADS, 128)."""
    chosen = chosen[chosen >= 0]
    if len(set(chosen.tolist())) != len(chosen) or len(chosen) != min(K, len(keys)) or (chosen >= len(keys)).any():
        return False
    if len(keys) <= K:
        return True
    rotated = q.astype(np.float64) @ hadamard_matrix(128).astype(np.float64)
    scores = np.maximum(keys.astype(np.float64) @ rotated.T, 0) @ weights.astype(np.float64) * 128**-0.5
    broken = np.flatnonzero(np.isnan(scores))[:K]
    if not set(broken) <= set(chosen):
        return False
    if len(broken) == K:
        return True
    sound, left = np.setdiff1d(chosen, broken), np.setdiff1d(np.arange(len(keys)), chosen)
    return scores[left].max() <= scores[sound].min() + 2 * error * np.nanmax(np.abs(scores))


class Session:
    """Requests of random tokens, some of them NaN; of each its keys as they were when its own step had stored them."""

    def __init__(self, rng, error):
        self.rng, self.error = rng, error
        self.manager = KVCacheManager(
            GEOMETRY, GEOMETRY.schedule, max_concurrent_requests=SLOTS, num_blocks_per_csa_layer=6,
            num_blocks_per_hca_layer=0, max_context_len=LENGTH, max_rollback=ROLLBACK, debug_nan=True,
        )  # fmt: skip
        self.keys, self.newest, self.chose, self.shared, self.taken_back = {}, {}, 0, 0, 0
        ones = np.ones(128, np.float32)
        self.weights = CompressorWeights(np.ones((4, 256), np.float32), ones, np.linspace(1, 0.1, 32, dtype=np.float32))

        @partial(jax.jit, donate_argnums=0)
        def step(cache, plan, kv, q, w):
            handle = LayerCacheHandle(cache.with_blocks(plan.new_blocks), plan, 0)
            handle = handle.write_indexer(kv, kv[:, ::-1], self.weights)
            return handle.cache, handle.select(q, w, K), handle.read_indexer_view()

        self.step = step

    def advance(self, counts):
        """Brings `counts` {slot: tokens} and judges what each token, and padding between them, chooses."""
        rng, manager = self.rng, self.manager
        counts = {slot: min(n, LENGTH - manager.length(slot)) for slot, n in counts.items()}
        rows = DECODE if max(counts.values(), default=0) <= 1 else CHUNK
        live = [(slot, manager.length(slot) + i) for slot, n in counts.items() for i in range(n)]
        at = np.sort(rng.permutation(rows)[: len(live)])
        if rows == CHUNK:  # in any order; a slot's tokens come in the order of their positions or not
            at = rng.permutation(at)
        slots, positions = np.full(rows, -1), rng.integers(0, LENGTH, rows)
        slots[at], positions[at] = [s for s, _ in live], [p for _, p in live]
        sizes = {} if rows == DECODE else {"num_segments": SLOTS, "width": WIDTH}
        try:
            plan = manager.plan_step(slots, positions, **sizes)
        except RuntimeError:  # no block is free: one who has some ends
            self.release(max(self.keys, key=manager.length))
            return
        kv = rng.standard_normal((rows, 256), dtype=np.float32)
        if rng.random() < 0.3:
            kv[rng.integers(rows)] = np.nan
        q = rng.standard_normal((rows, HEADS, 128), dtype=np.float32)
        w = rng.standard_normal((rows, HEADS), dtype=np.float32)
        manager.cache, chosen, view = self.step(manager.cache, plan, kv, q, w)
        chosen, keys = np.asarray(chosen), np.asarray(view.keys)
        for slot in counts:
            row = at[[s == slot for s, _ in live].index(True)]
            segment = row if plan.grouped is None else plan.grouped.rows[row] // WIDTH
            self.newest[slot] = max(self.newest[slot], manager.length(slot))
            have, closed = len(self.keys[slot]), manager.length(slot) // 4
            self.keys[slot] = np.concatenate([self.keys[slot], keys[segment, have:closed]])
        for row, slot, position in zip(range(rows), slots, positions, strict=True):
            if slot < 0:
                assert (chosen[row] == -1).all()
                continue
            seen = self.keys[slot][: (position + 1) // 4]
            assert is_right(chosen[row], seen, q[row], w[row], self.error), (slot, position)
            self.chose += len(seen) > K

    def admit(self):
        slot = self.manager.admit_request()
        self.keys[slot], self.newest[slot] = np.zeros((0, 128), np.float32), 0

    def release(self, slot):
        self.manager.release_request(slot)
        del self.keys[slot], self.newest[slot]

    def fork(self, slot):
        try:
            other = self.manager.fork(slot)
        except RuntimeError:
            return
        self.keys[other], self.newest[other] = self.keys[slot], self.newest[slot]
        self.shared += len(set(self.manager.blocks(slot)["csa"]) & set(self.manager.blocks(other)["csa"]))

    def roll_back(self, slot, count):
        length = self.manager.length(slot)
        count = max(0, min(count, length - max(0, self.newest[slot] - ROLLBACK)))
        self.manager.rollback(slot, count)
        self.taken_back += length // 4 > (length - count) // 4
        self.keys[slot] = self.keys[slot][: (length - count) // 4]

    def move(self):
        rng, running = self.rng, list(self.keys)
        what = rng.choice(["admit", "release", "fork", "back", "decode", "chunk", "chunk"])
        slot = rng.choice(running) if running else None
        if what == "admit" or slot is None:
            return len(running) < SLOTS and self.admit()
        if what == "release":
            return rng.random() < 0.3 and self.release(slot)
        if what == "fork":
            return len(running) < SLOTS and self.fork(slot)
        if what == "back":
            return self.roll_back(slot, int(rng.integers(0, ROLLBACK + 1)))
        some = [s for s in running if rng.random() < 0.8 and self.manager.length(s) < LENGTH]
        counts = {s: 1 if what == "decode" else int(rng.integers(1, WIDTH + 1)) for s in some[:3]}
        return some and self.advance(counts)


def test_slots_and_blocks_change_hands(implementation, rng):
    session = Session(rng, ERROR.get(implementation, 1e-5))
    for _ in range(120):
        session.move()
        session.manager.check()
    assert session.chose > 500
    assert session.shared
    assert session.taken_back
