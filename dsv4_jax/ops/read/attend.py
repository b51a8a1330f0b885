"""Attention over the window ring and the compressed entries, straight from what is stored."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from ..every_layer import attribute, is_static, segments_of, slots_of, table_of
from ..formats.record import Record
from ..segments import Segments, StepTokens
from .attend_jnp import Operands, Rule, attend_in_jnp

Array = jax.Array

CUDA_CAPABILITY = "9.0"
"""The compute capability that the CUDA form is written for; other GPUs run the jax.numpy form."""

MAX_HEADS = 128
"""Heads that the CUDA form takes."""

_PROCESSORS = 132  # of an H200, a thread block each


class RawQuery(NamedTuple):
    """What a query that comes straight from its projection still needs, and its output the other way round."""

    cos: Array  # (T, rope_dim // 2) float32, of the tokens' positions
    sin: Array  # (T, rope_dim // 2) float32
    eps: float  # of the RMS norm per head, which has no weight


def attend(
    q: Array,
    sink: Array,
    tokens: StepTokens,
    ring: Record,
    entries: Record | None = None,
    selected: Array | None = None,
    fresh: Record | None = None,
    raw: RawQuery | None = None,
    *,
    layer: int | Array,
    window: int,
    scale: float,
    ratio: int = 0,
    max_entries: int | None = None,
    implementation: str | None = None,
) -> Array:
    """One softmax of each token over its window, its compressed entries and a sink (arXiv 2606.19348, section 2.3).

    A token at position p of slot s sees the window, positions p - window + 1 to p, and the entries e < (p + 1) // ratio
    that have a block; of these the ones `selected`, where that is given. Slot, position and table decide, never what a
    row holds. Keys are values. The sink's logit only adds to the denominator. A token of slot -1 or out of range, or of
    a negative position, is padding and gets 0, as does one that sees nothing.

    Numbers: float32 arithmetic in "jnp" and "cpu", within 1e-5 of exact arithmetic on the same records (relative,
    L2 over a token's heads); 16-bit products in "cuda", within 1e-3 of bfloat16 queries (1.5e-3 of float32), before
    the result is rounded to its dtype. A token's bits depend on the shapes of the call alone: not on the order of
    the batch, on padding, on its slot, on the other tokens or on the run. What is not finite in a visible row makes
    that token's output NaN, and no other's.

    Args:
      q: (T, H, d) float32 | bfloat16, normed and rotated; with `raw` neither.
      sink: (H,) float32.
      tokens: slots and positions; with `fresh` the segments; with `entries` the table: entry e of slot s lies in block
        table[s, e // E].
      ring: arrays (L, R, W, ...); the row of a position is position mod W. It holds the token itself, unless `fresh`.
      entries: arrays (L, N, E, ...), the blocks of a pool; None for a layer without entries.
      selected: (T, K) int32, entries by index in the request in any order, -1 for none; one that is not visible counts
        as none, one that comes twice counts twice. None: every visible entry.
      fresh: (T, ...), the step's tokens as records in the form of the ring, where that is still as it was before the
        step; several of a slot see each other by position.
      raw: norms q per head (no weight), rotates its last 2 * cos.shape[1] dimensions, and rotates the output back.
      layer: index into L; an array () int32 must be one.
      window: positions a token sees in the ring, at most W.
      scale: factor of the scores.
      ratio: tokens per entry.
      max_entries: entries of a request that are looked at, a static bound; by default B * E.
      implementation: "jnp", "cpu" or "cuda"; None takes the native one where there is one that serves.
    Returns:
      (T, H, d) in the dtype of q.
    Raises:
      TypeError: for a wrong dtype.
      ValueError: for a wrong shape, layer, window or ratio, and for an implementation that cannot be used.
    """
    angles, eps = (None, 0.0) if raw is None else ((raw.cos, raw.sin), raw.eps)
    segments = None if fresh is None else tokens.grouped
    given = Operands(
        q, sink, tokens.slots, tokens.positions, ring, entries, tokens.table, selected, fresh, segments, angles
    )
    rule = Rule(layer, window, ratio, _check(given, layer, window, ratio, max_entries), scale, eps)
    if not rule.max_entries or (selected is not None and not selected.shape[1]):
        given = given._replace(entries=None, table=None, selected=None)

    def in_jnp(given: Operands) -> Array:
        # Elsewhere records are still read by native code.
        return attend_in_jnp(given, rule, "jnp" if implementation == "jnp" else None)

    def in_native(given: Operands) -> Array:
        parts = {
            "has_entries": given.entries, "has_selected": given.selected, "has_fresh": given.fresh, "raw": given.angles,
        }  # fmt: skip
        attributes: dict[str, Any] = {name: np.int64(part is not None) for name, part in parts.items()}
        for name, value in {**rule._asdict(), "layer": attribute(layer)}.items():
            attributes[name] = (np.float32 if name in ("scale", "eps") else np.int64)(value)
        result, operands = jax.ShapeDtypeStruct(q.shape, q.dtype), _addressed(given, layer)

        def without_scratch(operands: Any) -> Array:
            return dispatch.ffi_call("dsv4_attend", result)(*jax.tree.leaves(operands), **attributes)

        def on_cuda(operands: Any) -> Array:
            results = result, jax.ShapeDtypeStruct(scratch, jnp.float32)
            return dispatch.ffi_call("dsv4_attend", results)(*jax.tree.leaves(operands), **attributes)[0]

        looked_at = 0 if given.entries is None else rule.max_entries
        if given.selected is not None:
            looked_at = given.selected.shape[1]
        scratch = _scratch_shape(q.shape[0], q.shape[1], window, looked_at)
        if not scratch:
            return without_scratch(operands)
        return dispatch.on_platform(operands, default=without_scratch, cuda=on_cuda)

    return dispatch.call(
        "attend",
        implementation,
        lambda platform: _native_limit(platform, q.shape[1], ring, entries),
        in_native,
        in_jnp,
        given,
    )


def _addressed(given: Operands, layer: int | Array) -> Operands:
    """The operands as the native form takes them with `attribute(layer)`."""
    num_slots = given.ring.nope.shape[1]
    if given.entries is not None and given.table is not None:
        given = given._replace(table=table_of(given.table, layer, *given.entries.nope.shape[:2]))
    if given.segments is not None:
        given = given._replace(segments=segments_of(given.segments, layer, num_slots))
    return given._replace(slots=slots_of(given.slots, layer, num_slots))


def _native_limit(platform: str, heads: int, ring: Record, entries: Record | None) -> str | None:
    """What keeps the native form for "cpu" or "cuda" from serving; None if nothing does."""
    for record in (ring, entries):
        if record is not None and record.nope.dtype != jnp.uint8:
            return f"it reads only FP8 records (uint8), not {record.nope.dtype}"
    if platform != "cuda":
        return None
    widths = ring.nope.shape[-1], ring.rope.shape[-1]
    if widths != (448, 64):
        return f"it reads only records of 448 + 64 values, not {widths[0]} + {widths[1]}"
    if heads > MAX_HEADS:
        return f"it takes up to {MAX_HEADS} heads, not {heads}"
    found = compute_capability()
    if found != CUDA_CAPABILITY:
        return f"it needs a GPU of compute capability {CUDA_CAPABILITY}, not {found or 'none'}"
    return None


def _scratch_shape(tokens: int, heads: int, window: int, entries: int) -> tuple[int, ...]:
    """Shape of the CUDA form's scratch, () for none.

    Where few tokens see many rows, more thread blocks share the rows of a token than a cluster has; they leave their
    sums there. At most 17 MB, whatever the context.
    """
    groups = -(-heads // 64)
    blocks = -(-window // 64) - (-entries // 64)  # of rows
    parts = min(_PROCESSORS // max(tokens * groups, 1), blocks // 2)
    # One token of up to 160 blocks is for the kernel of few tokens.
    helps = parts >= 3 and blocks >= 32 and (tokens * groups > 1 or blocks > 160)
    return (tokens, groups, parts, 64 * (512 + 2)) if helps else ()


@functools.cache
def compute_capability() -> str | None:
    """That of the NVIDIA GPU that JAX uses, such as "9.0"; None where there is none."""
    try:
        return getattr(jax.devices("cuda")[0], "compute_capability", None)
    except RuntimeError:
        return None


def _check(given: Operands, layer: int | Array, window: int, ratio: int, max_entries: int | None) -> int:
    """Raises for what does not fit together; returns how many entries of a request are looked at, 0 without any."""
    q, ring, entries, table, selected = given.q, given.ring, given.entries, given.table, given.selected
    tokens, heads = q.shape[:2] if q.ndim == 3 else (0, 0)
    nope, rope = ring.nope.shape[-1], ring.rope.shape[-1]
    _expect("q", q, (tokens, heads, nope + rope), (jnp.float32, jnp.bfloat16))
    _expect("sink", given.sink, (heads,), (jnp.float32,))
    _expect("slots", given.slots, (tokens,), (jnp.int32,))
    _expect("positions", given.positions, (tokens,), (jnp.int32,))
    stacks = [("ring", ring)] if entries is None else [("ring", ring), ("entries", entries)]
    for name, record in stacks:
        if record.nope.ndim != 4:
            raise ValueError(f"attend: {name}.nope has shape {record.nope.shape}, expected 4 axes")
        if is_static(layer) and not 0 <= layer < record.nope.shape[0]:
            raise ValueError(f"attend: got layer {layer}; {name} has layers 0 to {record.nope.shape[0] - 1}")
        _expect_record(name, record, record.nope.shape[:3], ring)
    if not 1 <= window <= ring.nope.shape[2]:
        raise ValueError(f"attend: got window {window}; expected 1 to {ring.nope.shape[2]}, the rows of the ring")
    if (entries is None) != (table is None):
        missing, there = ("entries", "table") if entries is None else ("table", "entries")
        raise ValueError(f"attend: got {there} without {missing}")
    if given.fresh is not None and given.segments is not None:
        segments = given.segments
        _expect_record("fresh", given.fresh, (tokens,), ring)
        shapes = (*[segments.slots.shape[:1]] * 3, (*segments.slots.shape[:1], *segments.tokens.shape[1:2]), (tokens,))
        for name, x, shape in zip(Segments._fields, segments, shapes, strict=True):
            _expect(f"segments.{name}", x, shape, (jnp.int32,))
    if given.angles is not None:
        cos, sin = given.angles
        if not 0 < 2 * cos.shape[-1] <= nope + rope:
            raise ValueError(f"attend: raw.cos has shape {cos.shape}, expected ({tokens}, {rope // 2})")
        for name, x in (("cos", cos), ("sin", sin)):
            _expect(f"raw.{name}", x, (tokens, cos.shape[-1]), (jnp.float32,))
    if entries is None or table is None:
        if selected is not None:
            raise ValueError("attend: got selected without entries")
        return 0
    if ratio < 1:
        raise ValueError(f"attend: got ratio {ratio}; expected at least 1 where there are entries")
    _expect("table", table, (ring.nope.shape[1], *table.shape[1:2]), (jnp.int32,))
    if selected is not None:
        _expect("selected", selected, (tokens, *selected.shape[1:2]), (jnp.int32,))
    most = table.shape[1] * entries.nope.shape[2]
    return most if max_entries is None else min(max_entries, most)


def _expect(name: str, x: Array, shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"attend: {name} has shape {x.shape}, expected {shape}")
    if x.dtype not in dtypes:
        names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"attend: {name} has dtype {x.dtype}, expected {names}")


def _expect_record(name: str, record: Record, lead: tuple[int, ...], like: Record) -> None:
    """The record's arrays are (*lead, ...), in the form of those of `like`."""
    for part, x, other in zip(Record._fields, record, like, strict=True):
        if (x is None) != (other is None):
            raise ValueError(f"attend: {name} and ring are records of different forms")
        if x is not None and other is not None:
            _expect(f"{name}.{part}", x, (*lead, *other.shape[3:]), (other.dtype,))
