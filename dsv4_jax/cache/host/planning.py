"""Turning slots and positions into a step plan, with every check that can be made before the step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..counts import count, is_integer
from ..new_blocks import NewBlocks
from ..plan import StepPlan, group_tokens
from .requests import RequestTable
from .slot import Slot


@dataclass(frozen=True)
class StepSizes:
    """What `KVCacheManager.plan_step` is told of a step besides its tokens."""

    lookahead: int = 0
    limits: Any = None
    num_segments: int | None = None
    width: int | None = None
    max_blocks: int | None = None

    def checked(self) -> "StepSizes":
        """These sizes, `lookahead` as an int; ValueError for one that is no size."""
        lookahead = count("lookahead", self.lookahead)
        sizes = ("num_segments", self.num_segments, 0), ("width", self.width, 1), ("max_blocks", self.max_blocks, 0)
        for name, size, least in sizes:
            if size is not None:
                count(name, size, least=least)
        return replace(self, lookahead=lookahead)


@dataclass(frozen=True)
class PreparedStep:
    """A step that passed every check but that for free blocks; nothing has changed yet."""

    requests: RequestTable
    slots: np.ndarray
    positions: np.ndarray
    grouped: Any  # Segments, or None
    starts: dict[int, int]  # length of each request before the step
    ends: dict[int, int]  # and after it
    need: dict[str, dict[int, int]]  # by kind, the blocks that each slot lacks
    new_rows: int  # rows of `new_blocks`, the same for every step of one shape
    max_blocks: int | None

    def commit(self) -> StepPlan:
        """Gives out the blocks, all or none, and makes the plan; RuntimeError (OOM) when they do not suffice."""
        new = self.requests.ledger.extend(self.need)
        blocks = NewBlocks.of(new, self.new_rows)
        plan = StepPlan(self.slots, self.positions, self.grouped, blocks, self.max_blocks, self.requests.kept_blocks())
        self.requests.planned(int(blocks.number), self.starts, self.ends, new)
        return plan


def prepare_step(requests: RequestTable, request_slots: Any, positions: Any, sizes: StepSizes) -> PreparedStep:
    """The checks of `KVCacheManager.plan_step`, and what it will take; raises its ValueErrors."""
    sizes = sizes.checked()
    lookahead, max_blocks = min(sizes.lookahead, requests.max_context_len), sizes.max_blocks
    slots, positions = check_tokens(requests, request_slots, positions)
    grouped = group_tokens(slots, positions, sizes.num_segments, sizes.width)
    starts, ends = _spans(slots, positions)
    _check_starts(requests, starts)
    reach = _reach(slots, ends, lookahead, sizes.limits)
    for slot, end in () if max_blocks is None else reach.items():
        needed = max(requests.blocks_for(end).values(), default=0)
        if max_blocks is not None and needed > max_blocks:
            raise ValueError(f"max_blocks is {max_blocks}: slot {slot} needs {needed} blocks that readers look at")
    need = {kind: requests.all_missing(kind, reach) for kind in requests.ledger.kinds}
    # A fixed number of rows for a step's shape, so that steps of one shape compile once.
    segments, most = (len(slots), 1) if grouped is None else grouped.tokens.shape
    size = segments * (-(-(lookahead + most) // requests.block_size) + 1)
    return PreparedStep(requests, slots, positions, grouped, starts, ends, need, size, max_blocks)


def _reach(slots: np.ndarray, ends: dict[int, int], lookahead: int, limits: Any) -> dict[int, int]:
    """For each slot how many tokens its blocks must suffice for."""
    reach = {slot: end + lookahead for slot, end in ends.items()}
    if limits is None:
        return reach
    limits = np.asarray(limits)
    if limits.shape != slots.shape or not np.issubdtype(limits.dtype, np.integer):
        raise ValueError(f"limits is {limits.dtype}{limits.shape}: expected integers {slots.shape}, one for each token")
    return {slot: max(ends[slot], min(end, int(limits[slots == slot].max()))) for slot, end in reach.items()}


def _check_starts(requests: RequestTable, starts: dict[int, int]) -> None:
    """ValueError unless the tokens of each request follow the ones it has: nothing is forgotten or left out unseen."""
    for slot, start in starts.items():
        length = requests.length(slot)
        if start != length:
            what_to_do = (
                "roll back first, or cancel a plan that will not run"
                if start < length
                else "tell what a loop wrote beyond its plan with advance"
            )
            raise ValueError(
                f"slot {slot} brings position {start} and has {length} tokens: expected positions from {length} on; "
                f"{what_to_do}"
            )


def _spans(slots: np.ndarray, positions: np.ndarray) -> tuple[dict[int, int], dict[int, int]]:
    """By slot of a step, ascending: the first position, and the one after the last."""
    live = slots >= 0
    slots, positions = slots[live], positions[live]
    order = np.lexsort((positions, slots))
    slots, positions = slots[order], positions[order]
    first, last = np.ones((2, len(slots)), bool)
    first[1:] = last[:-1] = slots[1:] != slots[:-1]
    known = slots[first].tolist()
    starts, ends = positions[first].tolist(), (positions[last] + 1).tolist()
    return dict(zip(known, starts, strict=True)), dict(zip(known, ends, strict=True))


def check_handles(requests: RequestTable, request_slots: Any) -> None:
    """ValueError for a Slot among `request_slots` whose request has ended; an array has lost its Slots."""
    for slot in request_slots if isinstance(request_slots, Sequence) else ():
        if isinstance(slot, Slot):
            requests.require(slot)


def check_tokens(requests: RequestTable, request_slots: Any, positions: Any) -> tuple[np.ndarray, np.ndarray]:
    """request_slots and positions as (T,) int32; ValueError for what no step can take."""
    if is_integer(request_slots):  # one request's tokens, by its handle; a position below 0 is padding
        requests.require(request_slots)
        positions = np.asarray(positions)
        request_slots = np.where(positions >= 0, int(request_slots), -1)
        positions = np.maximum(positions, 0)
    check_handles(requests, request_slots)
    slots, positions = np.asarray(request_slots), np.asarray(positions)
    if slots.ndim != 1 or slots.shape != positions.shape:
        raise ValueError(f"request_slots has shape {slots.shape} and positions {positions.shape}: expected both (T,)")
    if slots.size and not (np.issubdtype(slots.dtype, np.integer) and np.issubdtype(positions.dtype, np.integer)):
        raise ValueError(f"request_slots is {slots.dtype} and positions {positions.dtype}: expected integers")
    given = set(slots[slots != -1].tolist())  # before a number too large becomes another
    if not given <= requests.ledger.running:
        for slot in sorted(given):
            requests.require(slot)
    slots = slots.astype(np.int32)
    live = positions[slots >= 0]
    if live.size and (live.min() < 0 or live.max() >= requests.max_context_len):
        raise ValueError(
            f"positions reach from {live.min()} to {live.max()}: expected 0 to {requests.max_context_len - 1} "
            "(max_context_len - 1)"
        )
    return slots, positions.astype(np.int32)


def why_unwritable(
    requests: RequestTable, layer_idx: int, kind: str, slots: np.ndarray, positions: np.ndarray
) -> str | None:
    """Why the entries of these tokens cannot be written in this layer; None when every block is there and unshared."""
    kept = requests.kept_blocks()
    starts, ends = _spans(slots, positions)
    for slot, end in ends.items() if kind in requests.ledger.kinds else ():
        schema, owned = requests.schema_of[kind], len(requests.ledger.blocks(slot)[kind])
        needed = schema.blocks_for(end)
        if needed > owned:
            return (
                f"layer {layer_idx}: slot {slot} has {owned} blocks and these positions need {needed}: call "
                f"allocate_block({layer_idx}, {slot}) first"
            )
        start = starts[slot]
        first = max(start // schema.compress_ratio // schema.entries_per_block, 0 if kept is None else int(kept[slot]))
        if requests.ledger.any_shared(slot, kind, first, needed):
            return (
                f"layer {layer_idx}: slot {slot} brings position {start}, whose block others read too (a fork, or a "
                f"kept prefix): expected positions from {requests.length(slot)} on"
            )
    return None


def slots_of_tokens(slots: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The slot (T,) of each token, whose request is ids (T,); ValueError when they contradict each other."""
    if ids.shape != positions.shape or slots.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"request_ids has shape {ids.shape} and dtype {ids.dtype}: expected integers, one for each of the "
            f"{positions.size} positions"
        )
    if slots.shape != positions.shape:
        if ids.size and not (ids.min() >= 0 and ids.max() < slots.size):
            raise ValueError(f"request_ids reach from {ids.min()} to {ids.max()}: there are {slots.size} request_slots")
        return slots[ids]
    live = slots >= 0
    pairs = {(int(s), int(i)) for s, i in zip(slots[live], ids[live], strict=True)}
    if len(pairs) != len({s for s, _ in pairs}) or len(pairs) != len({i for _, i in pairs}):
        raise ValueError(f"request_ids and request_slots disagree: got the pairs (slot, id) {sorted(pairs)[:8]}")
    return slots
