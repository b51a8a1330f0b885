"""attend: one suite for every implementation, against the contract written out in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.read.attend import RawQuery, attend
from dsv4_jax.ops.segments import Segments, StepTokens

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LAYERS, LAYER = 2, 1


# What decides the shapes is static; the rest is data, so that few programs serve many cases.
STATIC = ("layer", "window", "ratio", "scale", "eps", "max_entries", "implementation")


@jax.jit(static_argnames=STATIC)
def run(call, *, eps, **options):
    raw = call.pop("angles", None)
    return call_attend(**call, raw=None if raw is None else RawQuery(*raw, eps), **options)


def call_attend(*, slots, positions, table=None, segments=None, **call):
    return attend(tokens=StepTokens(slots, positions, segments, table), **call)


def new_records(rng, *shape, form="fp8"):
    """Records of 448 + 64 values of about 1, of any code but NaN."""
    if form in ("bf16", "fp32"):
        dtype = BF16 if form == "bf16" else np.float32
        return Record(*(rng.standard_normal((*shape, n)).astype(dtype) for n in (448, 64)), None)
    codes = np.asarray(rng.standard_normal((*shape, 448)) * 64, E4M3).view(np.uint8)
    plain = rng.standard_normal((*shape, 64)).astype(BF16)
    if form == "fp8":
        return Record(codes, plain, (rng.uniform(0.5, 1.5, shape) / 64).astype(np.float32))
    return Record(codes, plain, rng.integers(119, 123, (*shape, 8)).astype(np.uint8))


def decoded(record):
    """The stored values, (..., 512) float64."""
    rope = record.rope.astype(np.float64)
    if record.inv_scale is None:
        return np.concatenate([record.nope.astype(np.float64), rope], axis=-1)
    nope = record.nope.view(E4M3).astype(np.float64)
    if record.inv_scale.dtype == np.uint8:
        scale = np.where(record.inv_scale == 0xFF, np.nan, 2.0 ** (record.inv_scale.astype(np.float64) - 127))
        return np.concatenate([nope * np.repeat(scale[..., :7], 64, axis=-1), rope], axis=-1)
    return np.concatenate([nope * record.inv_scale[..., None].astype(np.float64), rope], axis=-1)


def at(record, *index):
    return jax.tree.map(lambda x: x[index], record)


def rotated(x, cos, sin):
    """The last 64 values of x (H, 512) as pairs, turned by the angles of cos and sin (32,)."""
    z = x[:, 448::2] + 1j * x[:, 449::2]
    z = z * (cos + 1j * sin)
    out = x.copy()
    out[:, 448::2], out[:, 449::2] = z.real, z.imag
    return out


def visible_vectors(case, t):
    """What token t sees, (n, 512) float64."""
    slot, p = int(case.slots[t]), int(case.positions[t])
    slots, rows = case.ring.nope.shape[1:3]
    if not 0 <= slot < slots or p < 0:
        return np.zeros((0, 512))
    seen = np.arange(max(0, p - case.window + 1), p + 1)
    vectors = [decoded(at(case.ring, LAYER, slot, seen % rows))]
    if case.fresh is not None:
        own = {int(q): i for i, (s, q) in enumerate(zip(case.slots, case.positions, strict=True)) if s == slot}
        fresh = [i for i, x in enumerate(seen.tolist()) if x in own]
        vectors[0][fresh] = decoded(at(case.fresh, [own[x] for x in seen[fresh].tolist()]))
    if case.entries is not None:
        per_block = case.entries.nope.shape[2]
        count = min((p + 1) // case.ratio, case.most)
        wanted = np.arange(count) if case.selected is None else case.selected[t]
        wanted = wanted[(wanted >= 0) & (wanted < count)]
        blocks = case.table[slot, wanted // per_block]
        wanted, blocks = wanted[blocks >= 0], blocks[blocks >= 0]
        vectors.append(decoded(at(case.entries, LAYER, blocks, wanted % per_block)))
    return np.concatenate(vectors)


@dataclasses.dataclass
class Case:
    """One call, in numpy."""

    q: np.ndarray
    sink: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    ring: Record
    window: int = 128
    ratio: int = 0
    entries: Record | None = None
    table: np.ndarray | None = None
    selected: np.ndarray | None = None
    fresh: Record | None = None  # of every token
    sizes: tuple[int, int] | None = None  # S and C of the segments
    angles: tuple[np.ndarray, np.ndarray] | None = None
    scale: float = 512**-0.5
    max_entries: int | None = None

    @property
    def most(self):
        """Entries of a request that are looked at."""
        most = self.table.shape[1] * self.entries.nope.shape[2]
        return most if self.max_entries is None else min(most, self.max_entries)

    def __call__(self, implementation):
        """(T, H, 512) as it comes."""
        call = {
            "q": self.q, "sink": self.sink, "slots": self.slots, "positions": self.positions, "ring": self.ring,
            "entries": self.entries, "table": self.table, "selected": self.selected, "angles": self.angles,
            "fresh": self.fresh,
            "segments": None if self.fresh is None else grouped(self.slots, self.positions, self.sizes),
        }  # fmt: skip
        return np.asarray(
            run(
                jax.tree.map(jnp.asarray, call), layer=LAYER, window=self.window, ratio=self.ratio, scale=self.scale,
                eps=1e-6, max_entries=self.max_entries, implementation=implementation,
            )
        )  # fmt: skip

    def exact(self, tokens=None):
        """(T, H, 512) float64, of the tokens asked for."""
        tokens = range(len(self.slots)) if tokens is None else tokens
        return np.stack([self.exact_token(t) for t in tokens])

    def exact_token(self, t):
        q, vectors = self.q[t].astype(np.float64), visible_vectors(self, t)
        if not len(vectors):
            return np.zeros_like(q)
        if self.angles is not None:
            cos, sin = (x[t].astype(np.float64) for x in self.angles)
            q = rotated(q / np.sqrt((q**2).mean(axis=-1, keepdims=True) + 1e-6), cos, sin)
        scores = q @ vectors.T * self.scale
        sink = self.sink.astype(np.float64)[:, None]
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = np.exp(scores - top)
        out = weights @ vectors / (weights.sum(axis=-1, keepdims=True) + np.exp(sink - top))
        return out if self.angles is None else rotated(out, cos, -sin)


def grouped(slots, positions, sizes):
    """The tokens by slot, in S segments of up to C."""
    tokens, (s, c) = len(slots), sizes
    out = Segments(
        np.full(s, -1, np.int32), np.zeros(s, np.int32), np.zeros(s, np.int32), np.full((s, c), tokens, np.int32),
        np.full(tokens, s * c, np.int32),
    )  # fmt: skip
    for i, slot in enumerate(sorted({int(x) for x in slots if x >= 0})):
        mine = sorted(np.flatnonzero(slots == slot), key=lambda t: positions[t])
        out.slots[i], out.starts[i], out.counts[i] = slot, positions[mine[0]], len(mine)
        out.tokens[i, : len(mine)] = mine
        out.rows[mine] = i * c + np.arange(len(mine))
    return out


def check(case, implementation, tokens=None):
    """Relative error of each token, L2 over its heads; returns the result."""
    got = case(implementation)
    assert got.dtype == case.q.dtype
    tokens = np.arange(len(case.slots)) if tokens is None else np.asarray(tokens)
    exact = case.exact(tokens)
    error = np.linalg.norm((got[tokens].astype(np.float64) - exact).reshape(len(tokens), -1), axis=-1)
    size = np.linalg.norm(exact.reshape(len(tokens), -1), axis=-1)
    # On the GPU probabilities and values are 16-bit factors; a bfloat16 result is rounded besides.
    rounding = 2.0**-9 if got.dtype == BF16 else 0
    bound = ({"cuda": 1e-3 if rounding else 1.5e-3}.get(implementation, 1e-5)) + rounding
    assert (error <= bound * size).all(), (error / np.maximum(size, 1e-30), size)
    return got


def new_case(rng, heads, slots, positions, *, form="fp8", rows=128, ratio=0, columns=0, dtype=np.float32, **options):
    """Random records; tables of blocks that requests share, with a few holes."""
    slots, positions = np.asarray(slots, np.int32), np.asarray(positions, np.int32)
    q = rng.standard_normal((len(slots), heads, 512)).astype(dtype)
    num_slots = max(2, int(slots.max(initial=0)) + 1)
    case = Case(
        q, rng.standard_normal(heads).astype(np.float32), slots, positions,
        new_records(rng, LAYERS, num_slots, rows, form=form), ratio=ratio, **options,
    )  # fmt: skip
    if ratio:
        case.entries = new_records(rng, LAYERS, 50, 128 // ratio, form=form)
        case.table = rng.integers(0, 50, (num_slots, columns)).astype(np.int32)
        case.table[rng.random(case.table.shape) < 0.05] = -1
    return case


CONTEXTS = np.array([1, 127, 128, 129, 255, 4096, 100_003, 2**20 - 1])


def pick(rng, case, k):
    """K entries of each token: some twice, some out of sight, -1 anywhere."""
    visible = (case.positions + 1) // case.ratio
    chosen = rng.integers(0, np.maximum(visible, 1)[:, None] + 3, (len(case.slots), k))
    chosen[rng.random(chosen.shape) < 0.2] = -1
    return chosen.astype(np.int32)


@pytest.mark.parametrize(
    ("heads", "rows", "window", "dtype", "form"),
    [(16, 128, 128, np.float32, "fp8"), (64, 37, 30, BF16, "fp8_ue8m0")],
)
def test_window(implementation, rng, heads, rows, window, dtype, form):
    """Contexts around a wrap of the ring, padding, a slot out of range."""
    slots = np.array([2, 0, -1, 1, 3, 4, 9, 5])
    positions = np.array([126, 127, 3, 128, 254, 0, 5, 2**20 - 2])
    case = new_case(rng, heads, slots, positions, form=form, rows=rows, window=window, dtype=dtype)
    case.ring = at(case.ring, slice(None), slice(0, 6))
    got = check(case, implementation)
    assert not got[[2, 6]].any()


@pytest.mark.parametrize(("form", "columns"), [("fp8", 8192), ("fp8_ue8m0", 50)])
def test_every_entry(implementation, rng, form, columns):
    """HCA at every context, in pieces; requests share blocks."""
    slots = np.array([4, 0, 6, 1, -1, 5, 2, 7, 3])
    positions = np.insert(CONTEXTS - 1, 4, 77)
    case = new_case(rng, 16, slots, positions, form=form, ratio=128, columns=columns)
    check(case, implementation)


@pytest.mark.parametrize(
    ("heads", "k", "contexts", "dtype", "form"),
    [
        (64, 512, CONTEXTS[[0, 5, 6, 7]], BF16, "fp8"),
        (128, 1024, CONTEXTS[7:], BF16, "fp8_ue8m0"),
        (96, 63, CONTEXTS[[2, 6, 4]], BF16, "fp8"),
        (16, 64, np.resize(CONTEXTS, 64), np.float32, "fp8_ue8m0"),
        (1, 1, np.resize(CONTEXTS, 130), np.float32, "fp8"),
        (1, 0, CONTEXTS[:3], np.float32, "fp8"),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else "",
)
def test_chosen_entries(implementation, rng, heads, k, contexts, dtype, form):
    """CSA, batches 1 to 130: any entries, some twice, some out of sight, -1 anywhere."""
    case = new_case(
        rng, heads, np.arange(len(contexts)), contexts - 1, dtype=dtype, form=form, rows=131, ratio=4, columns=8192
    )
    case.selected = pick(rng, case, k)
    check(case, implementation, tokens=np.unique(np.linspace(0, len(contexts) - 1, 9).astype(int)))


def test_rows_that_are_not_looked_at(implementation, rng):
    """max_entries bounds what is read, of all entries and of the chosen ones."""
    case = new_case(rng, 4, [0, 1], [4095, 300], ratio=4, columns=32, max_entries=100)
    check(case, implementation)
    check(dataclasses.replace(case, selected=rng.integers(0, 200, (2, 20)).astype(np.int32)), implementation)


def angles_of(positions):
    turns = positions[:, None] * 1e4 ** -(np.arange(32) / 32)
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_raw_queries(implementation, rng, dtype):
    case = new_case(rng, 16, [1, 0, 2], [3, 200, 1000], ratio=128, columns=8, dtype=dtype)
    case.q = (case.q.astype(np.float32) * rng.uniform(0.1, 9, (3, 16, 1))).astype(dtype)
    case.angles = angles_of(case.positions)
    check(case, implementation)


@pytest.mark.parametrize("form", ["bf16", "fp32"])
def test_exact_records(rng, form):
    """In jax.numpy, whatever is installed; of the other forms' suite, what decodes and what shares rows."""
    case = new_case(rng, 4, [1, 0], [3, 200], form=form, ratio=128, columns=8)
    check(case, None)
    for platform in ("cpu", "cuda"):
        if platform in dispatch.available():
            with pytest.raises(ValueError, match=rf"'{platform}' cannot be used: it reads only FP8 records"):
                case(platform)


# Several tokens of a slot.


class Requests:
    """Records of whole requests, in numpy: what was fed is in the ring, the rest is to come."""

    def __init__(self, rng, lengths, *, heads, form="fp8", ratio=0, rows=128, dtype=np.float32, **options):
        self.lengths, self.rows = lengths, rows
        self.options = {"ratio": ratio, **options}
        columns = -(-max(lengths) // 128)
        self.case = new_case(
            rng,
            heads,
            np.arange(len(lengths)),
            lengths,
            form=form,
            rows=rows,
            ratio=ratio,
            columns=columns,
            dtype=dtype,
        )
        self.q = rng.standard_normal((len(lengths), max(lengths), heads, 512)).astype(dtype)
        self.records = new_records(rng, len(lengths), max(lengths), form=form)
        self.k = None

    def step(self, tokens, sizes):
        """A case of tokens (slot, position) in any order, before they are written; slot -1 is padding."""
        slots, positions = (np.array(x, np.int32) for x in zip(*tokens, strict=True))
        live = np.maximum(slots, 0), np.minimum(positions, self.q.shape[1] - 1)
        case = dataclasses.replace(
            self.case, q=self.q[live], slots=slots, positions=positions, fresh=at(self.records, *live), sizes=sizes
        )
        if self.k is not None:
            case.selected = self.k[live]
        return case

    def write(self, tokens):
        for slot, p in sorted(t for t in tokens if t[0] >= 0):
            for array, record in zip(self.case.ring, self.records, strict=True):
                array[LAYER, slot, p % self.rows] = record[slot, p]


@pytest.mark.parametrize(
    ("ratio", "k", "form", "dtype"),
    [
        (128, None, "fp8_ue8m0", BF16), (4, 8, "fp8", np.float32),
        (4, 40, "fp8_ue8m0", np.float32),
    ],
)  # fmt: skip
def test_chunks_cut_anywhere(implementation, rng, ratio, k, form, dtype):
    """Two requests in chunks, shuffled and padded, then token by token: each gives what one chunk gives."""
    lengths, width = [300, 143], 150
    requests = Requests(rng, lengths, heads=4, ratio=ratio, form=form, rows=130, dtype=dtype)
    if k is not None:
        visible = (np.arange(300) + 1) // 4
        requests.k = rng.integers(-1, visible[None, :, None] + 2, (2, 300, k)).astype(np.int32)
    at_now = [0, 0]
    for ends in ((1, 5), (130, 5), (131, 143), (281, 143), (290, 143), (300, 143)):
        tokens = [(s, p) for s in (0, 1) for p in range(at_now[s], ends[s])]
        at_now = list(ends)
        padded = tokens + [(-1, 3)] * (2 * width - len(tokens))
        order = rng.permutation(len(padded))
        case = requests.step([padded[i] for i in order], (2, width))
        got = check(case, implementation, tokens=np.flatnonzero(order < len(tokens))[:: 1 + len(tokens) // 40])
        assert not got[order >= len(tokens)].any()
        requests.write(tokens)


def test_a_draft_sees_what_a_decode_step_sees(implementation, rng):
    """Four tokens of a slot at once, and one after the other."""
    requests = Requests(rng, [140, 140, 140], heads=16, ratio=128)
    requests.write([(s, p) for s in range(3) for p in range(125)])
    tokens = [(s, p) for p in range(125, 129) for s in (2, 0, 1)]
    together = check(requests.step(tokens, (3, 4)), implementation)
    for p in range(125, 129):
        now = [t for t in tokens if t[1] == p]
        requests.write(now)
        alone = dataclasses.replace(requests.step(now, None), fresh=None)
        alone = check(alone, implementation)
        mine = together[[i for i, t in enumerate(tokens) if t[1] == p]]
        tolerance = 2e-3 if implementation == "cuda" else 1e-5
        assert np.linalg.norm(alone - mine) <= tolerance * np.linalg.norm(mine)
        if implementation == "cpu":
            np.testing.assert_array_equal(alone, mine)


# Bits.


def same_bits(a, b):
    return a.tobytes() == b.tobytes()


@pytest.fixture(params=["every entry", "chosen entries", "several tokens"])
def batch(request, rng):
    """A case with padding, entries and tokens of different ages."""
    if request.param == "several tokens":
        requests = Requests(rng, [200, 200, 200], heads=16, ratio=128)
        requests.write([(s, p) for s in range(3) for p in range(124 + s)])
        return requests.step([(0, 124), (1, 125), (0, 125), (-1, 9), (2, 126), (0, 126), (2, 127), (-1, 0)], (4, 3))
    slots, positions = [0, 3, -1, 1, 2, 4, -1, 5], [0, 300, 9, 127, 128, 2000, 0, 5000]
    case = new_case(rng, 16, slots, positions, ratio=4, columns=48, dtype=BF16)
    if request.param == "chosen entries":
        case.selected = pick(rng, case, 30)
    return case


def reordered(case, order):
    return dataclasses.replace(
        case, q=case.q[order], slots=case.slots[order], positions=case.positions[order],
        selected=None if case.selected is None else case.selected[order],
        fresh=None if case.fresh is None else at(case.fresh, order),
    )  # fmt: skip


def test_bits_do_not_depend_on_order_company_or_padding(implementation, rng, batch):
    got = batch(implementation)
    assert same_bits(got, batch(implementation))
    order = rng.permutation(len(got))
    assert same_bits(reordered(batch, order)(implementation), got[order])
    # Without the others: all but slot 2 is padding now.
    alone = dataclasses.replace(batch, slots=np.where(batch.slots == 2, 2, -1).astype(np.int32))
    mine = batch.slots == 2
    assert same_bits(alone(implementation)[mine], got[mine])


def test_bits_do_not_depend_on_the_slot(implementation, batch):
    turned = dataclasses.replace(batch, slots=np.where(batch.slots >= 0, (batch.slots + 1) % 3, -1).astype(np.int32))
    few = batch.slots < 3
    turned.ring = jax.tree.map(lambda x: np.concatenate([np.roll(x[:, :3], 1, axis=1), x[:, 3:]], axis=1), batch.ring)
    turned.table = np.concatenate([np.roll(batch.table[:3], 1, axis=0), batch.table[3:]])
    turned.slots = np.where(few, turned.slots, -1).astype(np.int32)
    assert same_bits(turned(implementation)[few], batch(implementation)[few])


def among_padding(case, many):
    """The case with padding after its tokens, `many` rows in all."""
    rows, tokens = np.minimum(np.arange(many), len(case.slots) - 1), len(case.slots)
    longer = dataclasses.replace(
        reordered(case, rows),
        angles=None if case.angles is None else tuple(x[rows] for x in case.angles),
    )
    longer.slots[tokens:] = -1
    return longer


def test_as_exact_in_a_long_batch(implementation, batch):
    """On a GPU another kernel serves it."""
    check(among_padding(batch, 40), implementation, np.arange(len(batch.slots)))


@pytest.mark.parametrize("form", ["fp8", "fp8_ue8m0"])
def test_raw_queries_in_a_long_batch(implementation, rng, form):
    case = new_case(rng, 70, [1, 0, 2], [3, 200, 1000], form=form, ratio=128, columns=8, dtype=BF16)
    case.angles = angles_of(case.positions)
    check(among_padding(case, 40), implementation, np.arange(3))


def seen_rows(case):
    """Which ring rows and pool rows some token sees."""
    ring, pool = np.zeros(case.ring.nope.shape[1:3], bool), np.zeros(case.entries.nope.shape[1:3], bool)
    start = {int(s): min(case.positions[case.slots == s]) for s in case.slots if s >= 0}
    for t, (slot, p) in enumerate(zip(case.slots.tolist(), case.positions.tolist(), strict=True)):
        if slot < 0:
            continue
        newest = p if case.fresh is None else start[slot] - 1
        ring[slot, np.arange(max(0, p - case.window + 1), newest + 1) % ring.shape[1]] = True
        count = (p + 1) // case.ratio
        wanted = np.arange(count) if case.selected is None else case.selected[t]
        wanted = wanted[(wanted >= 0) & (wanted < count)]
        blocks = case.table[slot, wanted // pool.shape[1]]
        pool[blocks[blocks >= 0], (wanted % pool.shape[1])[blocks >= 0]] = True
    return ring, pool


def spoiled(record, where):
    """A copy that reads as NaN at `where`, of every part."""
    codes, rope, scale = (x.copy() for x in record)
    codes[where], rope[where], scale[where] = 0x7F, np.nan, np.nan
    return Record(codes, rope, scale)


def test_what_is_out_of_sight_changes_no_bit(implementation, batch):
    got = batch(implementation)
    ring, pool = seen_rows(batch)
    assert not ring.all()
    assert not pool.all()
    hidden = [np.broadcast_to(~x, (LAYERS, *x.shape)).copy() for x in (ring, pool)]
    for x in hidden:
        x[1 - LAYER] = True
    poisoned = dataclasses.replace(
        batch, ring=spoiled(batch.ring, hidden[0]), entries=spoiled(batch.entries, hidden[1]),
        q=np.where((batch.slots < 0)[:, None, None], np.asarray(np.nan, batch.q.dtype), batch.q),
    )  # fmt: skip
    if batch.fresh is not None:
        poisoned.fresh = spoiled(batch.fresh, batch.slots < 0)
    assert same_bits(poisoned(implementation), got)


def test_what_is_not_finite_stays_with_those_that_see_it(implementation, rng):
    requests = Requests(rng, [200, 200], heads=16, ratio=128)
    requests.write([(s, p) for s in range(2) for p in range(128)])
    case = requests.step([(0, 128), (0, 129), (1, 128), (0, 130), (1, 129), (-1, 0), (-1, 0), (-1, 0)], (4, 3))
    got = case(implementation)
    for poison in (np.nan, np.inf):
        fresh = jax.tree.map(np.copy, case.fresh)
        fresh.rope[1, 5] = poison  # of slot 0's position 129
        wrong = dataclasses.replace(case, fresh=fresh)(implementation)
        sees = (case.slots == 0) & (case.positions >= 129)
        assert not np.isfinite(wrong[sees]).all(axis=-1).any()
        assert same_bits(wrong[~sees], got[~sees])
        ring = jax.tree.map(np.copy, case.ring)
        ring.rope[LAYER, 0, 2, 5] = poison  # of slot 0's position 2, which 129 does not see; and 1 after it
        wrong = dataclasses.replace(case, ring=ring)(implementation)
        sees = (case.slots == 0) & (case.positions < 130)
        assert not np.isfinite(wrong[sees]).all(axis=-1).any()
        assert same_bits(wrong[~sees], got[~sees])


def test_a_sink_alone(implementation, rng):
    """A token that sees nothing gets 0, also where the sink weighs nothing or all."""
    case = new_case(rng, 3, [-1, 0, 7], [5, -3, 0])
    case.ring = at(case.ring, slice(None), slice(0, 7))
    for value in (-np.inf, 0.0, 80.0):
        case.sink[:] = value
        assert not case(implementation).any()
    seeing = new_case(rng, 3, [0, 1], [0, 140])
    seeing.sink[:] = [-np.inf, 50, 0]
    check(seeing, implementation)
    seeing.sink[1] = np.inf
    got = seeing(implementation)
    assert np.abs(got[:, 1]).max() < 1e-30
    assert (got[:, [0, 2]] != 0).any(axis=-1).all()


def test_no_heads_and_no_tokens(implementation, rng):
    assert new_case(rng, 0, [0, 1], [3, 140])(implementation).shape == (2, 0, 512)
    assert new_case(rng, 3, [], [])(implementation).shape == (0, 3, 512)


# Memory and errors.


@pytest.mark.parametrize(("ratio", "heads"), [(128, 64), (4, 64)], ids=["hca", "csa"])
def test_memory_of_a_long_context(ratio, heads):
    """A million tokens: what is live besides operands and results is bounded."""
    per_block, columns = 128 // ratio, 8192
    shape = jax.ShapeDtypeStruct
    requests = 2

    def records(*lead):
        return Record(shape((*lead, 448), jnp.uint8), shape((*lead, 64), jnp.bfloat16), shape(lead, jnp.float32))

    call = {
        "q": shape((requests, heads, 512), jnp.bfloat16), "sink": shape((heads,), jnp.float32),
        "slots": shape((requests,), jnp.int32), "positions": shape((requests,), jnp.int32),
        "ring": records(2, requests, 128), "entries": records(2, 100, per_block),
        "table": shape((requests, columns), jnp.int32),
    }  # fmt: skip
    compiled = run.lower(
        call, layer=1, window=128, ratio=ratio, scale=0.04, eps=0.0, max_entries=None, implementation="jnp"
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < requests * (64 << 20)


def test_errors(rng, monkeypatch):
    case = new_case(rng, 4, [0, 1], [3, 200], ratio=4, columns=8)
    case.selected = pick(rng, case, 5)

    def call(**changes):
        options = {"layer": 0, "window": 128, "ratio": 4, "scale": 1.0, "implementation": None}
        operands = {
            n: getattr(case, n) for n in ("q", "sink", "slots", "positions", "ring", "entries", "table", "selected")
        }
        for name, value in changes.items():
            (options if name in options else operands)[name] = value
        return call_attend(**jax.tree.map(jnp.asarray, operands), **options)

    for changes, message in [
        ({"q": case.q[..., :500]}, r"attend: q has shape \(2, 4, 500\), expected \(2, 4, 512\)"),
        ({"sink": case.sink[:3]}, r"attend: sink has shape \(3,\), expected \(4,\)"),
        ({"slots": case.slots[:1]}, r"attend: slots has shape \(1,\), expected \(2,\)"),
        ({"layer": 2}, "attend: got layer 2; ring has layers 0 to 1"),
        ({"window": 129}, "attend: got window 129; expected 1 to 128, the rows of the ring"),
        ({"ratio": 0}, "attend: got ratio 0; expected at least 1"),
        ({"table": None}, "attend: got entries without table"),
        ({"entries": None, "table": None}, "attend: got selected without entries"),
        ({"selected": case.selected[:1]}, r"attend: selected has shape \(1, 5\), expected \(2, 5\)"),
        ({"entries": case.entries._replace(inv_scale=None)}, "attend: entries and ring are records of different forms"),
        ({"implementation": "tpu"}, "attend: got implementation 'tpu'; expected None, 'jnp', 'cpu' or 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(TypeError, match="attend: q has dtype float16, expected float32 or bfloat16"):
        call(q=case.q.astype(np.float16))
    monkeypatch.setattr(dispatch, "available", lambda: frozenset({"cpu", "cuda"}))
    monkeypatch.setattr("dsv4_jax.ops.read.attend.compute_capability", lambda: "8.0")
    with pytest.raises(ValueError, match=r"'cuda' cannot be used: it needs a GPU of compute capability 9\.0, not 8\.0"):
        call(implementation="cuda")
    with pytest.raises(ValueError, match="it takes up to 128 heads, not 129"):
        call(implementation="cuda", q=np.zeros((2, 129, 512), np.float32), sink=np.zeros(129, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: np.zeros(3, np.float32)}, r"attend: got sink \(3\); expected \(4\)"),
        ({5: np.zeros((2, 2, 128, 64), np.float32)}, "attend: got rope of another dtype; expected bfloat16"),
        ({10: np.zeros((3, 8), np.int32)}, r"attend: got table \(3, 8\); expected \(2, 8\)"),
        ({11: np.zeros((1, 5), np.int32)}, r"attend: got selected \(1, 5\); expected \(2, 5\)"),
    ],
)
def test_the_handler_checks_what_it_gets(rng, changes, message):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    case = new_case(rng, 4, [0, 1], [3, 200], ratio=4, columns=8)
    operands = [
        case.q, case.sink, case.slots, case.positions, *case.ring, *case.entries, case.table, pick(rng, case, 5)
    ]  # fmt: skip
    for i, operand in changes.items():
        operands[i] = operand
    numbers = {"layer": 1, "window": 128, "ratio": 4, "max_entries": 256, "has_entries": 1, "has_selected": 1}
    attributes = {name: np.int64(n) for name, n in {**numbers, "has_fresh": 0, "raw": 0}.items()}
    call = jax.ffi.ffi_call("dsv4_attend", jax.ShapeDtypeStruct(case.q.shape, np.float32))
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*operands, **attributes, scale=np.float32(1), eps=np.float32(0)))


def test_the_cpu_form_refuses_segments_of_other_tokens(rng):
    if "cpu" not in dispatch.available():
        pytest.skip("no native library for cpu")
    requests = Requests(rng, [20, 20], heads=4)
    case = requests.step([(0, 3), (0, 4), (1, 5), (-1, 0)], (2, 2))
    segments = grouped(case.slots, case.positions, case.sizes)
    for name, value in (("counts", [2, 0]), ("tokens", [[0, 9], [2, 4]])):
        wrong = segments._replace(**{name: np.array(value, np.int32)})
        tokens = StepTokens(case.slots, case.positions, wrong)
        *operands, fresh = jax.tree.map(jnp.asarray, (case.q, case.sink, tokens, case.ring, case.fresh))
        with jax.default_device(jax.devices("cpu")[0]), pytest.raises(jax.errors.JaxRuntimeError, match="other tokens"):
            jax.block_until_ready(attend(*operands, fresh=fresh, layer=1, window=128, scale=1.0, implementation="cpu"))


def test_the_size_of_the_ring_changes_no_bit(implementation, rng):
    """Rows more, as `max_rollback` asks for, move every row: sums go by position."""
    window, tokens = 16, 40
    stream = new_records(rng, tokens)
    call = {
        "q": rng.standard_normal((3, 2, 512)).astype(np.float32), "sink": np.zeros(2, np.float32),
        "slots": np.int32([0, 1, 2]), "positions": np.int32([39, 20, 5]),
    }  # fmt: skip
    outs = []
    for rows in (window, window + 5, 37):
        ring = jax.tree.map(lambda x, rows=rows: np.zeros((LAYERS, 3, rows, *x.shape[1:]), x.dtype), stream)
        for slot, newest in enumerate(call["positions"]):
            for p in range(max(0, newest - rows + 1), newest + 1):
                for part, values in zip(ring[:3], stream[:3], strict=True):
                    part[LAYER, slot, p % rows] = values[p]
        outs.append(
            run({**call, "ring": ring}, layer=LAYER, window=window, scale=0.05, eps=0.0, implementation=implementation)
        )
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])
