"""The running tail of a compressor without overlap: the sums of the softmax so far, instead of the tokens in them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..segments import Segments, to_segments
from .compressor_tail import ClosedWindows, closed_windows, closing_positions
from .rows import set_rows

Array = jax.Array


class RunningTail(NamedTuple):
    """The sums of a window after each of its newest tokens; row = position of that token mod rows.

    A token starts from the row of the token before it, the first of a window from nothing: what a row holds counts only
    where the token before it, in the same window, wrote it. So n + 1 rows allow the last n tokens to be written again.
    The sums after a window's last token are never needed, and not written.
    """

    sums: Array
    """(L, R, rows, 5, d) float32. With k the values so far, z the gates (ape added) and t the largest z, per channel:
    t, the sum of e^(z - t), that of k e^(z - t), and what rounding has lost of either sum (Neumaier's summation)."""


def running_rows(max_rollback: int) -> int:
    """Rows that a tail needs so that the last `max_rollback` tokens, and always the newest, can be written again."""
    return max(max_rollback, 1) + 1


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding lost, exactly."""
    total = a + b
    rounded = total - a
    return total, (a - (total - rounded)) + (b - rounded)


def _weight(z: Array, top: Array) -> Array:
    """e^(z - top), 1 also where both are infinite."""
    return jnp.where(z == top, 1.0, jnp.exp(z - top))


def _sums_of_tokens(k: Array, z: Array) -> Array:
    """Sums (..., 5, d) over the tokens of k, z (..., n, d); a token with z = -inf adds nothing."""
    top = jnp.max(z, axis=-2)
    weight = _weight(z, top[..., None, :])
    total, weighted = jnp.sum(weight, axis=-2), jnp.sum(weight * k, axis=-2)
    nothing_lost = jnp.zeros_like(total)
    return jnp.stack([top, total, weighted, nothing_lost, nothing_lost], axis=-2)


def _merge(a: Array, b: Array) -> Array:
    """Sums (..., 5, d) over the tokens of both."""
    a, b = jnp.moveaxis(a, -2, 0), jnp.moveaxis(b, -2, 0)
    top = jnp.maximum(a[0], b[0])
    scale_a, scale_b = _weight(a[0], top), _weight(b[0], top)
    total, lost = _two_sum(a[1] * scale_a, b[1] * scale_b)
    weighted, weighted_lost = _two_sum(a[2] * scale_a, b[2] * scale_b)
    lost, weighted_lost = lost + a[3] * scale_a + b[3] * scale_b, weighted_lost + a[4] * scale_a + b[4] * scale_b
    return jnp.stack([top, total, weighted, lost, weighted_lost], axis=-2)


def _mean(sums: Array) -> Array:
    """The softmax-weighted mean (..., d) of sums (..., 5, d); NaN where a gate was infinite, as in the full softmax."""
    top, total, weighted, lost, weighted_lost = jnp.moveaxis(sums, -2, 0)
    return jnp.where(jnp.isfinite(top), (weighted + weighted_lost) / (total + lost), jnp.nan)


def take_tokens(
    tail: RunningTail,
    kv: Array,
    gate: Array,
    layer: int | Array,
    segments: Segments,
    ratio: int,
) -> tuple[ClosedWindows, RunningTail]:
    """Windows that the step's tokens close, and the tail with the tokens; kv, gate (T, d) float32 with ape."""
    rows, (num_segments, width) = tail.sums.shape[2], segments.tokens.shape
    starts, live = segments.starts[:, None], (segments.slots >= 0)[:, None]
    last, closes = closing_positions(segments, ratio)
    newest = starts + segments.counts[:, None] - 1 - jnp.arange(min(rows, width), dtype=jnp.int32)[None]
    keeps = live & (newest >= starts) & (newest % ratio != ratio - 1)

    # The sums after each position `at`: those of its window's tokens in this step, and of those before the step.
    at = jnp.concatenate([last, newest], axis=1)
    reach = min(ratio, width)
    token = (at - starts)[..., None] - reach + 1 + jnp.arange(reach, dtype=jnp.int32)[None, None]
    in_window = (token >= 0) & ((token + starts[..., None]) // ratio == (at // ratio)[..., None])
    row = jnp.arange(num_segments)[:, None, None], jnp.clip(token, 0, width - 1)
    k = jnp.where(in_window[..., None], to_segments(kv, segments)[row], 0.0)
    z = jnp.where(in_window[..., None], to_segments(gate, segments)[row], -jnp.inf)
    sums = _sums_of_tokens(k, z)
    before = tail.sums.at[layer, jnp.maximum(segments.slots, 0), (segments.starts - 1) % rows].get(mode="clip")
    has_before = (at // ratio * ratio < starts)[..., None, None]
    sums = jnp.where(has_before, _merge(before[:, None], sums), sums)

    most = last.shape[1]
    closed = closed_windows(_mean(sums[:, :most]), last, closes, segments, ratio)
    target = jnp.where(keeps, segments.slots[:, None], -1).reshape(-1)
    kept = sums[:, most:].reshape(-1, *sums.shape[2:])
    return closed, RunningTail(set_rows(tail.sums, (layer, target, (newest % rows).reshape(-1)), kept))
