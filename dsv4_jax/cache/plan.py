"""The plan of a step: its tokens, their slots, and the blocks given out for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..ops.segments import Segments, one_token_segments
from .new_blocks import cancel
from .serialisation import serialisable

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "positions", "grouped", "new_blocks", "kept_blocks"],
    meta_fields=["max_blocks"],
)
@dataclass(frozen=True)
class StepPlan:
    """What the host tells a step: O(tokens) numbers, whatever the context. A pytree.

    Attributes:
      slots: (T,) int32, token-major, -1 for padding.
      positions: (T,) int32.
      grouped: the tokens by request; None when every slot has one token.
      new_blocks: by kind (n, 3) int32 rows (slot, column, block), entered in the tables before anything else. Among
        them is the plan's number, by which the cache says that the step ran.
      max_blocks: static, how many blocks of a request readers look at; None for all that the table has.
      kept_blocks: (R,) int32, how many first blocks of each slot's request the step reads and does not write, because
        the tokens there are fed again only for ring and tails; None where there are none.
    """

    slots: Array | np.ndarray
    positions: Array | np.ndarray
    grouped: Segments | None = None
    new_blocks: Mapping[str, Array | np.ndarray] = field(default_factory=dict)
    max_blocks: int | None = None
    kept_blocks: Array | np.ndarray | None = None

    @property
    def one_token_per_slot(self) -> bool:
        """Whether this is a plain decode step, in which no slot has two tokens."""
        return self.grouped is None

    def cancel(self) -> None:
        """Says that the step will not run: the requests are as they were before the plan. Twice is as good as once.

        Dropping the plan and all copies of it says the same. Raises ValueError, and changes nothing, when the step ran
        (then roll back instead) or a later plan continues from its tokens (then cancel that one first).
        """
        cancel(self.new_blocks)

    @property
    def segments(self) -> Segments:
        """The tokens grouped by request."""
        if self.grouped is None:
            return one_token_segments(jnp.asarray(self.slots), jnp.asarray(self.positions))
        return Segments(*(jnp.asarray(x) for x in self.grouped))


serialisable(StepPlan, list, tuple)


def group_tokens(slots: np.ndarray, positions: np.ndarray, num_segments: int | None = None, width: int | None = None):
    """Segments (numpy) of tokens in any order, or None when no slot has two tokens.

    slots, positions: (T,) int32, slot -1 for padding. num_segments and width pad S and C to fixed sizes, so that steps
    of one shape compile once. Raises ValueError when a slot's positions are not consecutive (a gap, or one twice), or
    when the tokens do not fit the sizes.
    """
    num_tokens = len(slots)
    live = np.flatnonzero(slots >= 0)
    order = live[np.lexsort((positions[live], slots[live]))]
    unique, first, count = np.unique(slots[order], return_index=True, return_counts=True)
    most = max([1, *count.tolist()])
    if most == 1 and (width or 1) == 1:
        return None
    for slot, start, n in zip(unique, first, count, strict=True):
        run = positions[order[start : start + n]]
        if n > 1 and not np.array_equal(run, run[0] + np.arange(n)):
            raise ValueError(
                f"slot {slot} brings positions {run.tolist()[:8]}: expected consecutive positions, each once; "
                "split the step"
            )
    num_segments = len(unique) if num_segments is None else num_segments
    width = most if width is None else width
    if len(unique) > num_segments or most > width:
        raise ValueError(
            f"the step has {len(unique)} slots with up to {most} tokens: expected at most {num_segments} slots with "
            f"{width} tokens"
        )
    arrays: dict[str, Any] = {  # on the host: jit takes them as they are
        "slots": np.full(num_segments, -1, np.int32),
        "starts": np.zeros(num_segments, np.int32),
        "counts": np.zeros(num_segments, np.int32),
        "tokens": np.full((num_segments, width), num_tokens, np.int32),
        "rows": np.full(num_tokens, num_segments * width, np.int32),
    }
    segment = Segments(**arrays)
    for s, (slot, start, n) in enumerate(zip(unique, first, count, strict=True)):
        tokens = order[start : start + n]
        segment.slots[s], segment.starts[s], segment.counts[s] = slot, positions[tokens[0]], n
        segment.tokens[s, :n] = tokens
        segment.rows[tokens] = s * width + np.arange(n)
    return segment
