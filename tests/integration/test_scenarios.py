"""The life around a cache, scenario by scenario: what is written is what is seen, bit for bit, whatever came before.

The windows are the released ones (128, 4 and 128 tokens) in narrow records; with `life.session`, every step's views and
then those of every request are compared with what the tokens give from nothing. See also test_cuts.py and
test_rollback_and_fork.py (a model's logits), tests/cache/transfer/test_snapshot.py (a file with a flipped byte).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from life.fill import Fill
from life.session import Session
from life.worlds import Views, small
from small_model import SMALL
from stepper import Stepper

from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.host.prefix import PrefixPolicy
from dsv4_jax.cache.plan import StepPlan, group_tokens
from dsv4_jax.model.transformer import DSV4Model
from dsv4_jax.ops import dispatch
from dsv4_jax.ops.nn.rope import apply_rope, rope_angles

ROLLBACK = 5
RELEASED = SMALL.replace(compress_ratios=(0, 4, 128), csa_ratio=4, hca_ratio=128, sliding_window=128)
# Where no native form makes the last bit of an entry the same in every program, entries are compared in float32.
FORMAT = "fp8" if "cpu" in dispatch.available() else "fp32"
LONG = Views(Fill(RELEASED, length=530, width=64, max_rollback=ROLLBACK, cache_dtype=FORMAT))
RUNNING = Views(Fill(RELEASED, length=270, width=64, max_rollback=ROLLBACK, cache_dtype=FORMAT, hca_tail="running"))
SHORT = Views(small(FORMAT))


def session(world=LONG, *, slots=2, blocks=10, requests=1, **options):
    s = Session(world, slots=slots, blocks=blocks, **options)
    for i in range(requests):
        s.admit(i)
    return s


def feed(s, slot, end):
    """Chunks that end at exactly `end` tokens of a slot."""
    while (left := end - s.lengths[slot]) > 0:
        s.chunk(tuple(min(left, s.width) * (i == slot) for i in range(s.slots)), left)


def decode(s, slots, n):
    for i in range(n):
        s.decode(tuple(i in slots for i in range(s.slots)), i)


def free_blocks(s):
    return {kind: s.manager.num_free_blocks(kind) for kind in ("csa", "hca")}


# Edges of ring and windows.


@pytest.mark.parametrize("end", [127, 128, 129, 255, 256, 257, 511, 512, 513])
def test_ring(end):
    """The ring wraps at 128 and, with its slack, at 133: a prompt that ends there, then decode."""
    s = session()
    feed(s, 0, end)
    decode(s, [0], 3)
    s.end()


@pytest.mark.parametrize("end", [3, 4, 5, 7, 8, 127, 128, 129])
def test_windows(end):
    """A window closes at its last token, by decode and inside a chunk."""
    s = session(requests=2)
    feed(s, 0, end - 2)
    decode(s, [0], 5)
    feed(s, 1, end - 1)
    feed(s, 1, end + 6)
    s.end()


@pytest.mark.parametrize("remainder", [0, 1, 2, 3])
def test_prompt_length_mod_4(remainder):
    s = session()
    feed(s, 0, 24 + remainder)
    decode(s, [0], 9)
    s.end()


# Slots and blocks that somebody else had.


@pytest.mark.parametrize("length", [1, 2, 3])
def test_slot_reused_by_a_short_prompt_after_a_long_request(length):
    s = session(slots=1)
    feed(s, 0, 300)
    s.release(0)
    s.admit(7)
    feed(s, 0, length)
    decode(s, [0], 6)
    s.end()


def test_nan_in_free_blocks_changes_nothing():
    s = session(slots=3, requests=3)
    for slot in range(3):
        feed(s, slot, 140)
    s.release(1)
    s.poison()
    decode(s, [0, 2], 4)
    s.admit(9)
    feed(s, 1, 133)
    s.poison()
    decode(s, [0, 1, 2], 3)
    s.end()


def test_nan_in_the_debug_mode_changes_nothing():
    """The manager's own: what is freed is filled, and check() after every move sees that nobody writes there."""
    s = session(debug_nan=True, requests=2)
    feed(s, 0, 140)
    feed(s, 1, 20)
    s.release(0)
    decode(s, [1], 3)
    s.admit(5)
    feed(s, 0, 5)
    s.rollback(0, 2, 1)
    decode(s, [0, 1], 3)
    s.end()


# Going back and branching.


def rollback_across(world, edge, back):
    """To `back` tokens before the one behind an edge, and on with others."""
    s = session(world, slots=1)
    feed(s, 0, max(edge + 1 - back, 0))
    start = s.lengths[0]
    feed(s, 0, edge + 1)
    s.rollback(0, s.lengths[0] - start, 3)
    decode(s, [0], back + 1)
    s.end()


@pytest.mark.parametrize("back", range(1, ROLLBACK + 1))
@pytest.mark.parametrize("edge", [4, 128, 133, 256, 266], ids=lambda edge: f"edge{edge}")
def test_rollback_across_an_edge(edge, back):
    """Windows of 4 and 128, blocks, and the wrap of a ring of 133 rows."""
    rollback_across(LONG, edge, back)


@pytest.mark.parametrize("back", range(1, ROLLBACK + 1))
@pytest.mark.parametrize("edge", [128, 256], ids=lambda edge: f"edge{edge}")
def test_rollback_of_a_running_tail_across_an_edge(edge, back):
    """The sums of a window are those after the tokens that remain; a window that had closed is open again."""
    rollback_across(RUNNING, edge, back)


@pytest.mark.parametrize("at", [120, 126, 128, 252])
def test_fork_then_both_branches_cross_a_block_edge(at):
    s = session()
    feed(s, 0, at)
    s.fork(0, 8)
    assert s.lengths == {0: at, 1: at}
    s.chunk((13, 11), 1)
    decode(s, [0, 1], 2)
    s.release(0)
    decode(s, [1], 2)
    s.end()


# Prompts that begin like an earlier one.


def test_prefix_hit_that_ends_where_the_ring_is_gone():
    """State kept at 256 is the ring of then, whatever the request did since; where none was kept there is no hit."""
    s = session(prefix=PrefixPolicy("full"))
    feed(s, 0, 256)
    s.keep(0)
    feed(s, 0, 500)  # the ring has wrapped, and wraps on
    s.admit_like(0, 270, 0, 1)
    assert s.lengths == {0: 500, 1: 256}
    decode(s, [0, 1], 3)
    s.release(0)
    s.release(1)
    s.poison()
    s.admit_like(0, 256, 0, 2)  # a token is left to be fed: the hit would end at 128, where nothing was kept
    assert s.lengths == {0: 0}
    s.admit_like(0, 270, 0, 3)
    assert s.lengths[1] == 256
    decode(s, [1], 3)
    s.end()


def test_prefix_kept_too_late():
    """Fed in one go and kept afterwards, no state is left at an earlier block's end: then it is not a hit."""
    s = session(prefix=PrefixPolicy("full"))
    feed(s, 0, 300)
    s.keep(0)
    s.release(0)
    s.admit_like(0, 290, 0, 1)
    assert s.lengths == {1: 0}  # the slot that has been free longest
    feed(s, 1, 270)
    s.end()


# Padding.


@pytest.mark.parametrize("row", range(4))
def test_padding_in_every_position_of_a_decode_batch(row):
    s = session(SHORT, slots=4, requests=4)
    s.chunk((7, 2, 5, 3), 0)
    for out in range(4):
        slots, positions = np.full(4, -1, np.int32), np.zeros(4, np.int32)
        running = [slot for slot in range(4) if slot != out]
        rows = [i for i in range(4) if i != row]
        slots[rows], positions[rows] = running, [s.lengths[slot] for slot in running]
        s.world.step(s, s.manager.plan_step(slots, positions))
        for slot in running:
            s.lengths[slot] += 1
    decode(s, [0, 1, 2, 3], 2)
    s.end()


@pytest.mark.parametrize("row", range(0, 60, 4))
def test_padding_in_every_position_of_a_chunk(row):
    """A chunk without a hole but for four rows of padding that begin there; all tokens in the order of requests."""
    s = session(SHORT, slots=4, requests=4)
    slots = np.repeat(np.arange(4, dtype=np.int32), 15)[:56]
    positions = np.tile(np.arange(15, dtype=np.int32), 4)[:56]
    slots, positions = (np.insert(x, min(row, 56), [fill] * 4) for x, fill in ((slots, -1), (positions, 0)))
    plan = s.manager.plan_step(slots, positions, num_segments=4, width=15)
    s.world.step(s, plan)
    s.lengths = {0: 15, 1: 15, 2: 15, 3: 11}
    decode(s, [0, 1, 2, 3], 2)
    s.end()


# Pools that are just large enough, or not.


def test_the_smallest_pool_that_serves_a_request():
    """As many blocks as one request of the longest kind has: it runs to the end, and so does the next."""
    s = session(SHORT, slots=2, blocks=4, requests=2)
    for seed in range(2):
        while s.lengths[0] < s.limit - 1:
            s.chunk((6, 0), s.lengths[0])
        decode(s, [0], 1)
        assert s.lengths[0] == s.limit
        assert free_blocks(s)["csa"] == 0
        s.chunk((0, 4), 1)  # refused: the session knows
        assert s.lengths[1] == 0
        s.release(0)
        s.admit(seed)
    s.end()


def test_one_block_too_few_is_refused_whole_and_nothing_leaks():
    s = session(SHORT, slots=2, blocks=3, requests=2)
    feed(s, 0, 36)
    before = s.book()
    for slots, positions in (([0] * 4, range(36, 40)), ([0] * 4 + [1], [*range(36, 40), 0]), ([1] * 4, range(4))):
        with pytest.raises(RuntimeError, match="OOM: 1 more CSA blocks are needed, 0 are free"):
            s.manager.plan_step(slots, list(positions))
        assert s.book() == before
    s.release(0)
    feed(s, 1, 36)
    s.end()


# Ends.


def test_double_release():
    """The second is an error, also where the slot has another request by then; that one is not touched."""
    s = session(SHORT, slots=1)
    old = s.manager.active_slots[0]
    feed(s, 0, 9)
    s.release(0)
    for message in ("slot 0 holds no request", "slot 0 was released and has been given out again"):
        with pytest.raises(ValueError, match=message):
            s.manager.release_request(old)
        if not s.lengths:
            s.admit(1)
            feed(s, 0, 14)
    decode(s, [0], 2)
    s.end()


def _admitted(s):
    pass


def _in_its_prompt(s):
    s.chunk((7, 0), 0)


def _planned(s):
    return s.manager.plan_step([0] * 7, np.arange(7), num_segments=2, width=15)


def _planned_and_dropped(s):
    _planned(s)


def _planned_and_dispatched(s):
    plan = _planned(s)
    s.world.step(s, plan)


def _with_the_step(s):
    """The cache was donated to a step whose result comes after the end."""
    plan = _planned(s)
    return s.world.fill.step(s.manager.cache, plan, np.zeros(7, np.int32))


def _decoding(s):
    s.chunk((11, 0), 0)
    decode(s, [0], 2)


def _rolled_back(s):
    s.chunk((15, 0), 0)
    s.rollback(0, 4, 1)


def _a_child(s):
    s.chunk((15, 0), 0)
    s.release(1)
    s.fork(0, 3)


def _restored(s):
    s.chunk((15, 0), 0)
    s.snapshot(0, 2, 0)
    s.restore(0, 5)


@pytest.mark.parametrize(
    "phase",
    [
        _admitted, _in_its_prompt, _planned, _planned_and_dropped, _planned_and_dispatched, _with_the_step, _decoding,
        _rolled_back, _a_child, _restored,
    ],
)  # fmt: skip
def test_abort_in_every_phase(phase):
    """Nothing is left behind, and the other request goes on."""
    s = session(SHORT, requests=2)
    feed(s, 1, 9)
    total = dict.fromkeys(("csa", "hca"), s.num_blocks)
    left = phase(s)
    s.manager.release_request(0)
    s._forget(0)
    if isinstance(left, tuple):
        s.manager.cache = left[0]
    elif left is not None:
        s.manager.cache = s.world.fill.step(s.manager.cache, left, np.zeros(7, np.int32))[0]
    del left
    decode(s, [1], 3)
    s.admit(4)
    feed(s, 0, 15)
    decode(s, [0, 1], 3)
    s.end()
    assert free_blocks(s) == total


# Far out.


def test_a_million_tokens_on_a_sparse_layout():
    """Positions up to 2^20 - 1: only the last block of a table of 8,192 is real; entries are those of the same tokens
    near 0, but for the rotation of their last values. An entry without a block is dropped.
    """
    n = 136  # the last window of 128, and 8 tokens before it
    far = (1 << 20) - n
    manager = LONG.fill.new_manager(slots=2, blocks=4, max_context_len=1 << 20, cache_dtype="fp32")
    fill = LONG.fill
    assert manager.cache.block_table["csa"].shape == (2, 8192)

    @jax.jit
    def write(cache, plan, tokens):
        cache = cache.with_blocks(plan.new_blocks)
        for layer in range(3):
            kv = jnp.asarray(fill.tables[layer].window)[tokens]
            handle = fill._write_entries(LayerCacheHandle(cache, plan, layer), tokens)
            handle = handle.write_swa(kv, after=handle.read_swa_view(kv).kv)
            cache = handle.cache
        return cache

    @jax.jit
    def view(handle, selected):
        return handle.read_classical_view(selected), handle.read_swa_view(), handle.visible_entries()

    tokens = np.random.default_rng(5).integers(0, RELEASED.vocab_size, n).astype(np.int32)
    caches = {}
    for name, cache, start in (("far", manager.cache, far), ("near", manager.cache, 120)):
        for at in range(0, n, 68):
            slots, positions = np.ones(68, np.int32), start + at + np.arange(68, dtype=np.int32)
            cache = write(cache, far_plan(slots, positions, column=start // 128 + 1), tokens[at : at + 68])
        caches[name] = cache
    end = {"far": far + n, "near": 120 + n}
    seen = {}
    for name, cache in caches.items():
        plan = StepPlan(np.array([1], np.int32), np.array([end[name] - 1], np.int32))
        entry = np.array([[(end[name] // 4 - 1) - i for i in range(32)]], np.int32)
        for layer, chosen in ((1, entry), (2, np.array([[end[name] // 128 - 1]], np.int32))):
            handle = LayerCacheHandle(cache, plan, layer)
            seen[name, layer] = jax.tree.map(np.asarray, view(handle, chosen)), chosen
    for layer, ratio in ((1, 4), (2, 128)):
        (a, window_a, visible_a), entry_a = seen["far", layer]
        (b, window_b, visible_b), _ = seen["near", layer]
        assert visible_a[0] == end["far"] // ratio
        assert visible_b[0] == end["near"] // ratio
        assert a.valid.all()
        np.testing.assert_array_equal(a.positions, entry_a * ratio)
        np.testing.assert_array_equal(a.kv[..., : -RELEASED.rope_dim], b.kv[..., : -RELEASED.rope_dim])
        inv_freq = jnp.asarray(fill.tables[layer].weights.inv_freq)
        straight = [apply_rope(v.kv, *rope_angles(jnp.asarray(v.positions), inv_freq), inverse=True) for v in (a, b)]
        np.testing.assert_allclose(straight[0], straight[1], rtol=0, atol=2e-5)
        assert not np.allclose(a.kv, b.kv, atol=1e-2)
        # The same rows of the window, wherever in the ring they lie.
        order = [np.argsort(w.positions[0]) for w in (window_a, window_b)]
        for x, y in ((window_a.kv, window_b.kv), (window_a.valid, window_b.valid)):
            np.testing.assert_array_equal(x[0][order[0]], y[0][order[1]])
        assert window_a.valid.sum() == 128
    # The two entries before have no block: they are nowhere, and nothing else was written.
    for kind in ("csa", "hca"):
        table = np.asarray(caches["far"].block_table[kind])
        assert np.argwhere(table >= 0).tolist() == [[1, 8191]]
        nope = np.asarray(caches["far"].paged[kind].entries.nope)
        assert np.flatnonzero(nope.any(axis=(0, 2, 3))).tolist() == [2]


def far_plan(slots, positions, column):
    """A plan made by hand: one segment, block 2 for one column; the column after the table's last is dropped."""
    rows = np.array([[1, column, 2], [1, 8192, 3]], np.int32)
    return StepPlan(slots, positions, group_tokens(slots, positions, 1, 68), {"csa": rows, "hca": rows.copy()})


# Company.


def test_alone_and_among_15_others_the_same_bits():
    """Logits of a request that has the batch of 16 to itself, and of the same one between 15 others."""
    model = DSV4Model(SMALL, rngs=nnx.Rngs(3))
    ids = np.random.default_rng(4).integers(0, SMALL.vocab_size, (16, 30))
    logits = {}
    for company in (False, True):
        stepper = Stepper(model, 16, context=36, cache_dtype="fp8")
        for _ in range(16):
            stepper.manager.admit_request()
        lengths, rows = np.arange(16) % 5 if company else np.zeros(16, np.int64), []
        if company:  # of different ages
            for at in range(4):
                tokens = [(s, at, int(ids[s, at])) for s in range(16) if at < lengths[s] and s != 9]
                stepper.step(tokens, segments=16, width=1)
        lengths[9] = 0
        for at in range(26):
            who = range(16) if company else [9]
            tokens = [(s, int(lengths[s]) + at, int(ids[s, lengths[s] + at])) for s in who]
            if not company:  # in the same row of the batch
                tokens = [(9, at, int(ids[9, at]))]
            got = stepper.step(tokens, segments=16, width=1)
            rows.append(got[9] if company else got[0])
        logits[company] = np.stack(rows)
    np.testing.assert_array_equal(logits[True], logits[False])
