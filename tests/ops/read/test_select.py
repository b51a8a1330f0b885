"""Choosing entries: one suite for every implementation, against float64 arithmetic on the stored keys."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.fp4 import dequantise_fp4, hadamard_matrix, quantise_fp4
from dsv4_jax.ops.read import select as module
from dsv4_jax.ops.read.select import select
from dsv4_jax.ops.segments import Segments, StepTokens
from dsv4_jax.ops.write.compress import IndexerKeys

E, D, RATIO = 32, 128, 4
BF16 = ml_dtypes.bfloat16

BOUND = {"cuda": 2e-3}  # of a score's error, relative to the token's largest; else 1e-5


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# What decides the shapes is static; the rest is data, so that few programs serve many cases.
@jax.jit(static_argnames=("k", "format", "layer", "ratio", "max_entries", "piece_bytes", "implementation"))
def run(call, **options):
    return call_select(**call, **options)


def call_select(*, slots, positions, segments, table, **call):
    return select(tokens=StepTokens(slots, positions, segments, table), **call)


def segments_of(slots, positions):
    """By slot, in the order of positions, which are consecutive."""
    live = [t for t in range(len(slots)) if slots[t] >= 0 and positions[t] >= 0]
    names = sorted({slots[t] for t in live})
    most = max([1, *(sum(slots[t] == s for t in live) for s in names)])
    count = max(1, len(names))
    tokens, rows = np.full((count, most), len(slots)), np.full(len(slots), count * most)
    starts, counts, of = np.zeros(count), np.zeros(count), np.full(count, -1)
    for i, s in enumerate(names):
        mine = sorted((t for t in live if slots[t] == s), key=lambda t: positions[t])
        of[i], starts[i], counts[i] = s, positions[mine[0]], len(mine)
        tokens[i, : len(mine)], rows[mine] = mine, i * most + np.arange(len(mine))
    return Segments(*(np.asarray(x, np.int32) for x in (of, starts, counts, tokens, rows)))


@dataclasses.dataclass
class Case:
    """A call, its keys as stored and as values."""

    q: np.ndarray
    weights: np.ndarray
    slots: list
    positions: list
    keys: IndexerKeys
    values: np.ndarray  # (N, E, D)
    table: np.ndarray
    k: int
    format: str = "nvfp4"
    raw: tuple | None = None
    max_entries: int | None = None

    def __call__(self, implementation, **options):
        slots, positions = np.asarray(self.slots, np.int32), np.asarray(self.positions, np.int32)
        call = {
            "q": self.q, "weights": self.weights, "slots": slots, "positions": positions, "keys": self.keys,
            "table": self.table, "segments": segments_of(slots, positions), "raw": self.raw,
        }  # fmt: skip
        got = run(
            jax.tree.map(jnp.asarray, call), k=self.k, format=self.format, layer=0, ratio=RATIO,
            max_entries=self.max_entries, implementation=implementation, **options,
        )  # fmt: skip
        assert got.shape == (len(slots), self.k)
        assert got.dtype == jnp.int32
        return np.asarray(got)

    def seen(self, t):
        """Which entries a token sees, (B * E,) bool."""
        entries = np.arange(self.table.shape[1] * E)
        if not 0 <= self.slots[t] < len(self.table) or self.positions[t] < 0:
            return entries < 0
        most = len(entries) if self.max_entries is None else self.max_entries
        given = np.repeat(self.table[self.slots[t]] >= 0, E)
        return given & (entries < min((self.positions[t] + 1) // RATIO, most))

    def scores(self, t):
        """Float64 scores of all entries of the token's slot."""
        q = self.q[t].astype(np.float64)
        if self.raw is not None:
            cos, sin = (np.asarray(x[t], np.float64) for x in self.raw)
            even, odd = q[:, D // 2 :: 2].copy(), q[:, D // 2 + 1 :: 2].copy()
            q[:, D // 2 :: 2], q[:, D // 2 + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
        if self.format in ("nvfp4", "mxfp4"):
            q = q @ hadamard_matrix(D).astype(np.float64)
        keys = self.values[np.maximum(self.table[self.slots[t]], 0)].reshape(-1, D).astype(np.float64)
        return np.maximum(keys @ q.T, 0) @ self.weights[t].astype(np.float64) * D**-0.5


def stored(values, format):
    """Keys as stored, and the values that these stand for; values (N, E, D) float32."""
    if format in ("fp32", "bf16"):
        keys = values.astype(BF16 if format == "bf16" else np.float32)
        return IndexerKeys(keys[None], None), keys.astype(np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        codes, scales = jax.jit(quantise_fp4, static_argnums=1)(values[None], format)
        exact = np.array(jax.jit(dequantise_fp4, static_argnums=2)(codes, scales, format))
    return IndexerKeys(np.array(codes), np.array(scales)), exact[0]


def new_pool(rng, blocks, format="nvfp4", scale=1.0):
    return stored(rng.standard_normal((blocks, E, D), dtype=np.float32) * np.float32(scale), format)


def new_case(rng, slots, visible, k, *, heads=4, blocks=6, format="nvfp4", dtype=np.float32, pool=None, **options):
    """One token of each (slot, entries that it sees)."""
    requests = max([0, *slots]) + 1
    keys, values = pool or new_pool(rng, requests * blocks, format)
    table = rng.permutation(requests * blocks).reshape(requests, blocks).astype(np.int32)
    tokens = len(slots)
    q = rng.standard_normal((tokens, heads, D), dtype=np.float32).astype(dtype)
    w = rng.standard_normal((tokens, heads), dtype=np.float32)
    positions = [RATIO * v + int(rng.integers(0, RATIO)) - 1 for v in visible]
    return Case(q, w, list(slots), positions, keys, values, table, k, format, **options)


def check(case, implementation, tokens=None, **options):
    got = case(implementation, **options)
    for t in range(len(case.slots)) if tokens is None else tokens:
        seen, chosen = case.seen(t), got[t][got[t] >= 0]
        assert len(set(chosen.tolist())) == len(chosen) == min(case.k, int(seen.sum()))
        assert seen[chosen].all()
        assert ((got[t] >= 0) | (got[t] == -1)).all()
        left = seen.copy()
        left[chosen] = False
        if not left.any():
            continue
        scores = case.scores(t)
        # Nothing left out beats what was chosen, but by the error of both scores.
        error = 2 * BOUND.get(implementation, 1e-5) * np.abs(scores[seen]).max()
        assert scores[left].max() <= scores[chosen].min() + error
        if implementation != "jnp":
            assert (np.diff(chosen) > 0).all()
    return got


@pytest.mark.parametrize(
    ("format", "heads"), [*((f, h) for f in ("nvfp4", "mxfp4", "fp32") for h in (1, 16, 64)), ("bf16", 16)]
)
def test_against_float64(implementation, rng, format, heads):
    """Slots, contexts around k, padding; queries of both dtypes."""
    if format in ("fp32", "bf16") and implementation in ("cpu", "cuda"):
        pytest.skip("FP4 keys alone")
    k, dtype = 64, BF16 if heads == 16 else np.float32
    slots, visible = [0, 1, 0, 1, 0, 1, 0, -1, 0], [0, 1, k - 1, k, k + 1, 192, 77, 150, 0]
    case = new_case(rng, slots, visible, k, heads=heads, format=format, dtype=dtype)
    case.slots[8] = 7  # out of range
    check(case, implementation)
    check(dataclasses.replace(case, k=1), implementation)


@pytest.fixture(scope="module")
def many():
    """262,144 keys, as stored and as values."""
    codes, scales = (
        np.random.default_rng(3).integers((0, 40), (256, 56), (8192, E, 64, 2), np.uint8).transpose(3, 0, 1, 2)
    )
    keys = IndexerKeys(codes[None], np.ascontiguousarray(scales[None, ..., :8]))
    with jax.default_device(jax.devices("cpu")[0]):
        values = jax.jit(dequantise_fp4, static_argnums=2)(*keys, "nvfp4")[0]
    return keys, np.array(values)


@pytest.mark.parametrize("k", [1, 64, 512, 1024, 2048])
def test_many(implementation, rng, many, k):
    """As many as there are, one more and one less, among many and very many; nearly all are the exact ones."""
    keys, values = many
    for blocks, visible in ((512, [0, 1, k - 1, k, k + 1, 16_384]), (8192, [262_144])):
        pool = IndexerKeys(*(x[:, :blocks] for x in keys)), values[:blocks]
        tokens = len(visible)
        case = new_case(rng, [0] * tokens, visible, k, heads=2, blocks=blocks, pool=pool)
        case.slots, case.table = list(range(tokens)), np.repeat(case.table, tokens, axis=0)  # forks: the same blocks
        got = check(case, implementation)
        if blocks == 512:
            exact = np.argsort(-case.scores(5), kind="stable")[:k]
            assert len(set(exact.tolist()) & set(got[5].tolist())) >= 0.99 * k - 1


@pytest.mark.parametrize("k", [1, 64, 512, 1024, 2048])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.gpu
def test_a_million_tokens(k, format):
    rng = np.random.default_rng(9)
    case = new_case(rng, [0, 0], [262_143, 262_144], k, heads=64, blocks=8192, format=format, dtype=BF16)
    with jax.default_device(jax.devices("gpu")[0]):
        got = check(case, "cuda")
        np.testing.assert_array_equal(case("cuda"), got)
        few = dataclasses.replace(case, positions=[RATIO * n - 1 for n in (16_385, 100_000)])
        check(few, "cuda")


@pytest.mark.parametrize("zero", ["weights", "query"])
def test_equal_scores_go_to_the_lower_index(implementation, rng, zero):
    case = new_case(rng, [0, 1], [128, 192], 50)
    (case.weights if zero == "weights" else case.q)[:] = 0
    got = case(implementation)
    for chosen in got:
        assert sorted(chosen.tolist()) == list(range(50))


def test_equal_keys_go_to_the_lower_index(implementation, rng):
    """Every key four times: of the last that is chosen those of lower index."""
    case = new_case(rng, [0], [192], 50, heads=16)
    order = case.table[0].copy()
    for x in (case.keys.keys[0], case.keys.scale[0], case.values):
        x[order[1:4]] = x[order[0]]
    case.positions, case.k = [RATIO * 128 - 1], 50
    chosen = np.sort(check(case, implementation)[0])
    of_key = {key: chosen[chosen % E == key] // E for key in range(E)}
    assert sorted(len(x) for x in of_key.values() if len(x)) == [2, *[4] * 12]
    assert all(x.tolist() == list(range(len(x))) for x in of_key.values())


@pytest.mark.parametrize("sign", ["negative", "mixed, one head"])
def test_negative_weights(implementation, rng, sign):
    """Zeros beat what is negative; -0 and 0 are equal."""
    case = new_case(rng, [0, 1], [192, 150], 64, heads=1 if "one" in sign else 4)
    case.weights = -np.abs(case.weights)
    got = check(case, implementation)
    if "one" in sign:
        for t in range(2):
            zeros = np.flatnonzero((case.scores(t) == 0) & case.seen(t))
            assert np.sort(got[t]).tolist() == zeros[:64].tolist()


def test_near_ties(implementation, rng):
    """Scores that differ by far less than they are: most of the best are found, and the others are as good."""
    case = new_case(rng, [0], [192], 64, heads=16)
    base = np.abs(rng.standard_normal(D)).astype(np.float32) + 1
    values = base * (1 + 0.02 * rng.standard_normal((6, E, 1), dtype=np.float32))
    case.keys, case.values = stored(values + 0.1 * rng.standard_normal((6, E, D), dtype=np.float32), "nvfp4")
    case.weights = np.abs(case.weights)
    chosen = check(case, implementation)[0]
    exact = np.argsort(-case.scores(0)[:192], kind="stable")[:64]
    assert len(set(exact.tolist()) & set(chosen.tolist())) >= 62


def test_magnitudes(implementation, rng):
    """Queries, weights and keys far from 1."""
    for format, sizes in (("nvfp4", (0.02, 400.0)), ("mxfp4", (1e-3, 1e6))):
        for size in sizes:
            pool = new_pool(rng, 6, format, size)
            case = new_case(rng, [0], [192], 64, format=format, pool=pool)
            case.q *= np.float32(1 / size)
            case.weights *= np.float32([1e-6, 1, 1e3, 1e-30])
            check(case, implementation)


def test_nan_is_seen_and_out_of_sight_is_not(implementation, rng):
    for format in ("nvfp4", "mxfp4"):
        case = new_case(rng, [0], [100], 8, format=format)
        plain = case(implementation)[0]
        codes, scales = (x.copy() for x in case.keys)
        order, nan = case.table[0], 0x7F if format == "nvfp4" else 0xFF
        for block, entry in ((1, 3), (3, 20)):
            codes[0, order[block], entry], scales[0, order[block], entry, -1] = 0x77, nan
        case.keys = IndexerKeys(codes, scales)
        got = case(implementation)[0].tolist()
        assert 35 in got
        assert 116 not in got
        assert len(set(got) - set(plain.tolist())) <= 1
        few = dataclasses.replace(case, positions=[RATIO * 35 - 1])
        check(few, implementation)


@pytest.mark.parametrize("part", ["q", "weights"])
def test_what_is_not_finite(implementation, rng, part):
    """One value of a token makes all of its scores NaN: equal, so the first are chosen; of the other token none."""
    case = new_case(rng, [0, 1], [100, 100], 8)
    plain = case(implementation)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        case.q, case.weights = case.q.copy(), case.weights.copy()
        getattr(case, part)[0, ..., 1] = value
        got = case(implementation)
        assert sorted(got[0].tolist()) == list(range(8))
        np.testing.assert_array_equal(got[1], plain[1])


def test_entries_without_a_block_are_not_chosen(implementation, rng):
    case = new_case(rng, [0], [128], 90)
    case.table = np.asarray([[0, -1, 2, 3, 5, 4]], np.int32)
    case.weights = -np.abs(case.weights)
    few = check(case, implementation)[0]
    assert (few >= 0).all()
    assert not ((few >= 32) & (few < 64)).any()
    for k in (96, 100, 128, 200):
        everything = check(dataclasses.replace(case, k=k), implementation)[0]
        assert sorted(everything[everything >= 0].tolist()) == [*range(32), *range(64, 128)]


def test_a_bound_on_entries(implementation, rng):
    """Entries beyond it are not looked at; where it is at most k no key is."""
    case = new_case(rng, [0, 1], [192, 40], 64, max_entries=96)
    check(case, implementation)
    check(dataclasses.replace(case, max_entries=64), implementation)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_pieces_and_company_change_nothing(implementation, rng, dtype, monkeypatch):
    """Prompts in one piece or in many, with raw queries, choose what each token alone chooses."""
    slots = [0] * 7 + [-1] + [1] * 5 + [2] * 131
    visible = [*range(100, 107), 5, *range(70, 75), *(60 + i for i in range(131))]
    case = new_case(rng, slots, visible, 20, dtype=dtype)
    case.positions = (
        [4 * 100 + i for i in range(7)] + [5] + [4 * 70 + i for i in range(5)] + [280 + i for i in range(131)]
    )
    angles = rng.uniform(-3, 3, (len(slots), 32)).astype(np.float32)
    case.raw = np.cos(angles), np.sin(angles)
    whole = check(case, implementation, tokens=[0, 6, 7, 8, 12, 13, 80, 143])
    if implementation == "jnp":
        few = case(implementation, piece_bytes=3 * 4 * 192 * 4 * 30)
    else:
        monkeypatch.setattr(module, "SCORE_BYTES", 50 * 4 * 204)
        jax.clear_caches()
        few = case(implementation)
    np.testing.assert_array_equal(np.sort(few, axis=1), np.sort(whole, axis=1))
    order = rng.permutation(len(slots))[:64]
    some = dataclasses.replace(
        case, q=case.q[order], weights=case.weights[order], slots=[slots[t] for t in order],
        positions=[case.positions[t] for t in order], raw=tuple(x[order] for x in case.raw),
    )  # fmt: skip
    if implementation != "jnp":
        np.testing.assert_array_equal(some(implementation), whole[order])


def test_memory_of_a_long_chunk(implementation):
    """8,192 tokens that see 262,144 entries, 8 GiB of scores: a part of them at a time is held."""
    if implementation == "cuda":
        pytest.skip("compiled for the device that others use; the bound is the same")
    tokens, blocks, heads = 8192, 8192, 64
    struct = jax.ShapeDtypeStruct
    row = struct((tokens,), jnp.int32)
    call = {
        "q": struct((tokens, heads, D), jnp.bfloat16), "weights": struct((tokens, heads), jnp.float32),
        "slots": row, "positions": row,
        "keys": IndexerKeys(struct((1, blocks, E, D // 2), jnp.uint8), struct((1, blocks, E, 8), jnp.uint8)),
        "table": struct((1, blocks), jnp.int32),
        "segments": Segments(*(struct(x, jnp.int32) for x in ((1,), (1,), (1,), (1, tokens), (tokens,)))),
    }  # fmt: skip
    options = {"k": 512, "format": "nvfp4", "layer": 0, "ratio": RATIO, "implementation": implementation}
    held = run.lower(call, **options).compile().memory_analysis().temp_size_in_bytes
    # In "jnp" also the keys and, twice, the queries as float32.
    at_once = module.PIECE_BYTES + (blocks * E + 2 * tokens * heads) * D * 4
    assert held < 1.1 * (at_once if implementation == "jnp" else module.SCORE_BYTES)


def test_messages(rng):
    case = new_case(rng, [0], [100], 8)
    with pytest.raises(ValueError, match=r"select: got ratio 4 and k 0; expected at least 1"):
        dataclasses.replace(case, k=0)("jnp")
    tokens = StepTokens(np.zeros(1, np.int32), np.zeros(1, np.int32), segments_of([0], [0]), case.table)
    with pytest.raises(ValueError, match=r"select: got layer 3; keys has layers 0 to 0"):
        select(case.q, case.weights, tokens, case.keys, 8, format="nvfp4", layer=3, ratio=4)
    with pytest.raises(ValueError, match=r"expected None, 'jnp', 'cpu' or 'cuda'"):
        case("gpu")
    if "cpu" in dispatch.available():
        plain = new_case(rng, [0], [100], 8, format="fp32")
        with pytest.raises(
            ValueError, match=r"'cpu' cannot be used: it reads only FP4 keys, not fp32; leave it to None"
        ):
            plain("cpu")
