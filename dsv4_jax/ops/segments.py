"""How the tokens of one step are grouped by request.

A step is token-major: every token has a slot and a position of its own, in any order. Reading the cache once per
request instead of once per token needs the grouping that this file describes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Segments(NamedTuple):
    """The tokens of one step by request: segment s is the run of consecutive positions of one slot.

    Shapes: S segments, C most tokens of one segment, T tokens of the step. All int32.
    """

    slots: Array  # (S,) slot, -1 where the segment is padding
    starts: Array  # (S,) position of the segment's first token
    counts: Array  # (S,) tokens in the segment, 0 for padding
    tokens: Array  # (S, C) row of each token in the token-major batch, T where there is none
    rows: Array  # (T,) s * C + c of each token, S * C for a padding token


class StepTokens(NamedTuple):
    """Where the tokens of a step go. T tokens, R slots, B blocks of a request at most."""

    slots: Array  # (T,) int32, -1 for padding
    positions: Array  # (T,) int32
    segments: Segments | None = None  # the same by request; None where nothing needs it
    table: Array | None = None  # (R, B) int32 block table, -1 where no block is given; None in a layer without blocks

    @property
    def one_per_slot(self) -> bool:
        """Whether the grouping promises that no slot comes twice, as in a decode step."""
        return self.segments is not None and self.segments.tokens.shape[1] == 1

    @property
    def grouped(self) -> Segments:
        """The segments, which an operation needs."""
        assert self.segments is not None
        return self.segments

    @property
    def blocks(self) -> Array:
        """The block table, which an operation needs."""
        assert self.table is not None
        return self.table


def one_token_segments(slots: Array, positions: Array) -> Segments:
    """Segments of a decode step: slots (T,), positions (T,) int32, each slot at most once, -1 for padding."""
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)
    live = (slots >= 0) & (positions >= 0)
    return Segments(
        slots=jnp.where(live, slots, -1),
        starts=jnp.where(live, positions, 0),
        counts=live.astype(jnp.int32),
        tokens=rows[:, None],
        rows=rows,
    )


def to_segments(x: Array, segments: Segments) -> Array:
    """Token-major x (T, ...) -> (S, C, ...); rows without a token are zero."""
    if segments.tokens.shape[1] == 1:
        return x[:, None]
    if not x.shape[0]:  # XLA gathers nothing from an empty array, not even what is filled in
        return jnp.zeros((*segments.tokens.shape, *x.shape[1:]), x.dtype)
    return x.at[segments.tokens].get(mode="fill", fill_value=0)


def to_tokens(x: Array, segments: Segments) -> Array:
    """Segment-major x (S, C, ...) -> (T, ...); padding tokens are zero."""
    if segments.tokens.shape[1] == 1:
        return x[:, 0]
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[segments.rows].get(mode="fill", fill_value=0)


def per_token(x: Array, segments: Segments) -> Array:
    """A value per segment, x (S, ...), given to each of its tokens: (T, ...); padding tokens get zero."""
    if segments.tokens.shape[1] == 1:
        return x
    return x.at[segments.rows // segments.tokens.shape[1]].get(mode="fill", fill_value=0)
