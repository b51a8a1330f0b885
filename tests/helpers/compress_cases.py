"""What the tests of compress share: caches filled with what nobody would write, steps, and the contract in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_jax.cache.plan import group_tokens
from dsv4_jax.ops.formats.fp4 import GROUP_SIZE, hadamard_matrix
from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.nn.rope import rope_frequencies
from dsv4_jax.ops.segments import Segments, StepTokens, one_token_segments
from dsv4_jax.ops.write.compress import (
    CompressorTail,
    CompressorWeights,
    IndexerKeys,
    Projections,
    compress,
    compress_indexer,
)
from dsv4_jax.ops.write.running_tail import RunningTail, running_rows

BF16 = ml_dtypes.bfloat16
EPS = 1e-6


class Geometry(NamedTuple):
    ratio: int
    lanes: int
    dim: int
    rope_dim: int
    per_block: int
    key_format: str | None = None  # of indexer keys; None for records
    rollback: int = 0
    scales: int | None = None  # of a record, where it has a power of two for every 64 values
    running: bool = False

    @property
    def rows(self):
        """Tail rows of lane a and of lane b."""
        return self.lanes * self.ratio - 1 + self.rollback, self.ratio - 1 + self.rollback


CSA = Geometry(4, 2, 512, 64, 32)
HCA = Geometry(128, 1, 512, 64, 1)
CSA_UE8M0 = CSA._replace(scales=8)
HCA_UE8M0 = HCA._replace(scales=8)
RUNNING = HCA._replace(running=True)
NVFP4 = Geometry(4, 2, 128, 64, 32, "nvfp4")
MXFP4 = Geometry(4, 2, 128, 64, 32, "mxfp4")


class State(NamedTuple):
    stored: Record | IndexerKeys
    tail: CompressorTail | RunningTail
    table: np.ndarray


def poisoned(shape, dtype):
    if np.dtype(dtype) == np.uint8:
        return np.full(shape, 0xAA, np.uint8)
    return np.full(shape, np.nan, dtype)


def new_state(rng, g, *, layers=2, slots=5, columns=6):
    """Tails of NaN, pools of 0xAA, and blocks given out in random order."""
    blocks = slots * columns + 1
    pool = (layers, blocks, g.per_block)
    if g.key_format:
        group = GROUP_SIZE[g.key_format]
        stored = IndexerKeys(poisoned((*pool, g.dim // 2), np.uint8), poisoned((*pool, g.dim // group), np.uint8))
    else:
        nope = g.dim - g.rope_dim
        scale = poisoned((*pool, g.scales), np.uint8) if g.scales else poisoned(pool, "f4")
        stored = Record(poisoned((*pool, nope), np.uint8), poisoned((*pool, g.rope_dim), BF16), scale)
    table = rng.permutation(blocks)[: slots * columns].reshape(slots, columns).astype(np.int32)
    if g.running:
        rows = running_rows(g.rollback)
        return State(stored, RunningTail(poisoned((layers, slots, rows, 5, g.dim), np.float32)), table)
    a, b = (poisoned((layers, slots, rows, g.dim), np.float32) for rows in g.rows)
    tail = CompressorTail(a, a.copy(), *((b, b.copy()) if g.lanes == 2 else (None, None)))
    return State(stored, tail, table)


def new_weights(rng, g):
    return CompressorWeights(
        ape=rng.standard_normal((g.ratio, g.lanes * g.dim)).astype(np.float32),
        norm=(1 + 0.1 * rng.standard_normal(g.dim)).astype(np.float32),
        inv_freq=rope_frequencies(g.rope_dim, 160000.0, factor=16.0, original_max_position=65536),
    )


@functools.partial(
    jax.jit, static_argnames=("key_format", "layer", "rotate", "implementation"), donate_argnames=("stored", "tail")
)
def run(stored, tail, kv, gate, weights, slots, positions, segments, table, key_format, **options):
    tokens = StepTokens(slots, positions, segments, table)
    args = (stored, tail, Projections(kv, gate, weights), tokens)
    if key_format is None:
        options.pop("rotate", None)
        return compress(*args, eps=EPS, **options)
    return compress_indexer(*args, format=key_format, eps=EPS, **options)


class Step(NamedTuple):
    kv: np.ndarray
    gate: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    segments: Segments


def new_step(rng, g, lengths, counts, dtype, *, padding=1, width=None, shuffled=True):
    """The next counts[slot] tokens of every slot, in any order, with padding between them; moves lengths on.

    width: most tokens a slot brings in any step, so that steps have two shapes, one of them of decode steps.
    """
    if width and max(counts) > 1:
        padding += max(0, 2 * width - sum(counts))
    elif width:
        padding, width = padding + len(counts) - sum(counts), None
    slots = np.concatenate([np.full(n, s) for s, n in enumerate(counts)] + [np.full(padding, -1)])
    positions = np.concatenate([lengths[s] + np.arange(n) for s, n in enumerate(counts)] + [np.full(padding, 77)])
    order = rng.permutation(len(slots)) if shuffled else np.arange(len(slots))
    slots, positions = slots[order].astype(np.int32), positions[order].astype(np.int32)
    segments = group_tokens(slots, positions, num_segments=len(counts) + 1, width=width) or one_token_segments(
        slots, positions
    )
    lengths += counts
    shape = (len(slots), g.lanes * g.dim)
    kv = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 4, (1, shape[1]))
    return Step(kv.astype(dtype), (2 * rng.standard_normal(shape)).astype(dtype), slots, positions, segments)


def apply_step(g, state, step, weights, **options):
    segments = Segments(*(jnp.asarray(x) for x in step.segments))
    stored, tail = run(
        *jax.tree.map(jnp.asarray, (state.stored, state.tail)),
        jnp.asarray(step.kv), jnp.asarray(step.gate), weights, jnp.asarray(step.slots), jnp.asarray(step.positions),
        segments, jnp.asarray(state.table), g.key_format, **options,
    )  # fmt: skip
    return State(*jax.tree.map(np.asarray, (stored, tail)), state.table)


def history(steps, slot):
    """kv and gate of a slot by position."""
    rows = {}
    for step in steps:
        for t in np.flatnonzero(step.slots == slot):
            rows[int(step.positions[t])] = step.kv[t], step.gate[t]
    n = len(rows)
    assert sorted(rows) == list(range(n))
    return tuple(np.stack([rows[p][i] for p in range(n)]) for i in range(2))


def expected_sums(g, weights, kv, gate):
    """Of one request after its last token, float64: largest z, weight sum, weighted sum and its terms' magnitudes."""
    first = (len(kv) - 1) // g.ratio * g.ratio
    k, z = kv[first:].astype(np.float64), gate[first:].astype(np.float32) + weights.ape[: len(kv) - first]
    weight = np.exp(z.astype(np.float64) - z.max(0))
    return z.max(0), weight.sum(0), (weight * k).sum(0), (weight * np.abs(k)).sum(0)


def expected_entries(g, weights, kv, gate, rotate=True):
    """Entries (n // ratio, dim) float64 of one request, from the definition."""
    n = len(kv) // g.ratio * g.ratio
    windows, lanes_dim = n // g.ratio, g.lanes * g.dim
    if not windows:
        return np.zeros((0, g.dim))
    kv = kv[:n].astype(np.float64).reshape(windows, g.ratio, lanes_dim)
    z = gate[:n].astype(np.float64).reshape(windows, g.ratio, lanes_dim) + weights.ape
    if g.lanes == 2:
        before = np.zeros((1, g.ratio, g.dim))
        k_a = np.concatenate([before, kv[:-1, :, : g.dim]])
        z_a = np.concatenate([before - np.inf, z[:-1, :, : g.dim]])
        kv, z = np.concatenate([k_a, kv[..., g.dim :]], 1), np.concatenate([z_a, z[..., g.dim :]], 1)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    x = (p * kv).sum(1) / p.sum(1)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weights.norm
    angles = (np.arange(windows) * g.ratio).astype(np.float32)[:, None] * weights.inv_freq
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    pairs = x[:, -g.rope_dim :].reshape(windows, -1, 2)
    x[:, -g.rope_dim :] = np.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1
    ).reshape(windows, -1)
    return x @ hadamard_matrix(g.dim).astype(np.float64) if g.key_format and rotate else x
