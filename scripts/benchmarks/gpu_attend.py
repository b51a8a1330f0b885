"""Rows of the GPU benchmark: attention over stored records, beside the least that bytes and arithmetic allow.

FlashMLA's numbers are those of its sparse FP8 decode kernel with its combine, measured on an H200 for as many rows.
"""

import functools
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from gpu_reads import random_records
from gpu_timing import Row, warmed

from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.read.attend import RawQuery, attend
from dsv4_jax.ops.segments import Segments, StepTokens

Array = jax.Array

SLOTS, ENTRIES, LAYERS = 128, 8192, 2  # entries of a slot
RECORD_BYTES = 580
FLOPS = 989e12  # a second, dense products of 16 bits on an H200

# (heads, entries a token sees): {batch: (goal, FlashMLA)}, microseconds.
DECODE = {
    (64, 0): {1: (5, 11.0), 64: (8, 12.6), 128: (10, 14.3)},
    (64, 512): {1: (6, 12.9), 16: (11, 17.7), 64: (24, 43.3), 128: (28, 44.7)},
    (64, 8192): {1: (12, 28.9), 16: (45, 80.9), 64: (150, 238.0), 128: (250, 445.0)},
    (128, 1024): {1: (7, 14.4), 64: (38, 52.7), 128: (75, 103.0)},
}
_LOCK = threading.Lock()


def once(make: Callable[..., tuple]) -> Callable[..., tuple]:
    """What several rows share is made once, whichever thread comes first."""
    cached = functools.cache(make)

    def call(*args):
        with _LOCK:
            return cached(*args)

    return call


@once
def stored(per_block: int) -> tuple[Record, Record, Array]:
    """Ring of every slot, pool and table: ENTRIES of each slot, in random blocks."""
    columns = ENTRIES // per_block
    pool = random_records("fp8", LAYERS, SLOTS * columns, per_block)
    table = jax.random.permutation(jax.random.key(3), SLOTS * columns).astype(jnp.int32).reshape(SLOTS, columns)
    return random_records("fp8", LAYERS, SLOTS, 128), pool, table


def queries(tokens: int, heads: int) -> tuple[Array, Array, RawQuery]:
    """As the projection gives them."""
    q = jax.random.normal(jax.random.key(5), (tokens, heads, 512), jnp.bfloat16)
    angle = jax.random.uniform(jax.random.key(6), (tokens, 32))
    return q, jnp.zeros(heads), RawQuery(jnp.cos(angle), jnp.sin(angle), 1e-6)


def least(tokens: int, heads: int, rows_read: int, rows_seen: float) -> dict:
    """Bytes that must move for so many records, q and the result; microseconds of the products."""
    work = 4 * tokens * heads * rows_seen * 512
    return {"total": RECORD_BYTES * rows_read + 2 * tokens * heads * 1024, "arithmetic": work / FLOPS * 1e6}


def decode(heads: int, entries: int, batch: int) -> Row:
    """One token of every request; each call of the program reads other requests, or another layer."""
    selects = entries not in (0, ENTRIES)
    ring, pool, table = stored(32 if selects else 1)
    calls = max(LAYERS, min(16, LAYERS * SLOTS // batch))
    q, sink, raw = queries(batch, heads)
    selected = jax.random.randint(jax.random.key(4), (batch, entries if selects else 0), 0, ENTRIES, jnp.int32)
    ratio = 4 if selects else 128
    positions = jnp.full(batch, ratio * ENTRIES - 1, jnp.int32)

    @jax.jit
    def run(ring, pool, table, q, sink, cos, sin, selected, positions):
        out = []
        for i in range(calls):
            slots = (jnp.arange(batch, dtype=jnp.int32) + i // LAYERS * batch) % SLOTS
            of_pool = {"entries": pool, "ratio": ratio} if entries else {}
            out.append(
                attend(
                    q,
                    sink,
                    StepTokens(slots, positions, table=table if entries else None),
                    ring,
                    selected=selected if selects else None,
                    raw=RawQuery(cos, sin, raw.eps),
                    layer=i % LAYERS,
                    window=128,
                    scale=512**-0.5,
                    **of_pool,
                )
            )
        return out

    goal, flash_mla = DECODE[heads, entries][batch]
    return warmed(
        f"attend, 128 + {entries} rows, {heads} heads, batch {batch}",
        lambda _: run(ring, pool, table, q, sink, raw.cos, raw.sin, selected, positions),
        None,
        per=calls,
        target=goal,
        peer=("FlashMLA", flash_mla),
        **least(batch, heads, batch * (128 + entries), 128 + entries),
    )


def _segments(slots: int, each: int, start: int) -> tuple[np.ndarray, np.ndarray, Segments]:
    """`each` consecutive tokens of every slot: slots, positions, segments."""
    rows = np.arange(slots * each, dtype=np.int32)
    segments = Segments(
        np.arange(slots, dtype=np.int32), np.full(slots, start, np.int32), np.full(slots, each, np.int32),
        rows.reshape(slots, each), rows,
    )  # fmt: skip
    return rows // each, start + rows % each, segments


@once
def several(kind: str, slots: int, each: int) -> tuple[Callable, Array]:
    """The program of a step that brings several tokens of a slot (where they start is data), and what was chosen."""
    heads, tokens = 64, slots * each
    ratio = {"swa": 0, "csa": 4, "hca": 128}[kind]
    q, sink, raw = queries(tokens, heads)
    fresh = random_records("fp8", tokens)

    @jax.jit
    def run(ring, pool, table, q, sink, cos, sin, selected, fresh, slots, positions, segments):
        of_pool = {"entries": pool, "ratio": ratio} if ratio else {}
        where = StepTokens(slots, positions, segments, table if ratio else None)
        return [
            attend(
                q, sink, where, ring, selected=selected if kind == "csa" else None,
                fresh=fresh, raw=RawQuery(cos, sin, raw.eps), layer=layer, window=128,
                scale=512**-0.5, **of_pool,
            )
            for layer in range(LAYERS)
        ]  # fmt: skip

    def call(ring, pool, table, selected, where):
        slots, positions, segments = where
        return run(ring, pool, table, q, sink, raw.cos, raw.sin, selected, fresh, slots, positions, segments)

    return call, jax.random.uniform(jax.random.key(4), (tokens, 512))


@once
def long_tables() -> tuple[Array, Array]:
    """Tables of one slot of 139,264 tokens, in the pools of `stored`: CSA, HCA."""
    csa = jax.random.permutation(jax.random.key(3), SLOTS * ENTRIES // 32)[:1088].astype(jnp.int32)
    return csa[None], jax.random.permutation(jax.random.key(3), SLOTS * ENTRIES)[:1088].astype(jnp.int32)[None]


def step(kind: str, slots: int, each: int, start: int) -> Row:
    """A chunk of a prompt (one slot), or drafts of every slot, after `start` tokens of context."""
    ratio = {"swa": 128, "csa": 4, "hca": 128}[kind]
    ring, pool, table = stored(32 if kind == "csa" else 1)
    if slots == 1:
        ring, table = jax.tree.map(lambda x: x[:, :1], ring), long_tables()[kind != "csa"]
    else:
        ring, table = jax.tree.map(lambda x: x[:, :slots], ring), table[:slots]
    call, fractions = several(kind, slots, each)
    where = _segments(slots, each, start)
    visible = (where[1] + 1) // ratio
    selected = (fractions * jnp.asarray(np.maximum(visible, 1))[:, None]).astype(jnp.int32)
    seen = {"swa": np.zeros_like(visible), "csa": np.minimum(visible, 512), "hca": visible}[kind]
    if kind == "csa":  # where all are visible each comes once
        order = jnp.arange(512, dtype=jnp.int32)[None]
        shown = jnp.asarray(visible)[:, None]
        selected = jnp.where(shown <= 512, jnp.where(order < shown, order, -1), selected)
    entries_read = {"swa": 0, "csa": min(int(visible[-1]) * slots, int(seen.sum())), "hca": int(visible[-1]) * slots}[
        kind
    ]
    rows_read = slots * (min(start, 127) + each) + entries_read
    rows_seen = float((np.minimum(where[1] + 1, 128) + seen).mean())
    what = f"chunk of {each} tokens" if slots == 1 else f"{slots} slots of {each} tokens"
    return warmed(
        f"attend, {kind.upper()}, {what} after {start}, 64 heads",
        lambda _: call(ring, pool, table, selected, where),
        None,
        per=LAYERS,
        **least(slots * each, 64, rows_read, rows_seen),
    )


def rows() -> list[functools.partial[Row]]:
    """All rows, not yet prepared."""
    made = [
        functools.partial(decode, heads, entries, batch)
        for (heads, entries), batches in DECODE.items()
        for batch in batches
    ]
    for each in (2048, 8192):
        made.append(functools.partial(step, "swa", 1, each, 32_768))
        made.extend(
            functools.partial(step, kind, 1, each, start) for kind in ("csa", "hca") for start in (0, 32_768, 131_072)
        )
    made.extend(functools.partial(step, kind, 16, 4, 32_000) for kind in ("swa", "csa", "hca"))
    return made
