"""The running requests as the host knows them: their slots, lengths and blocks."""

import heapq

from .ledger import BlockLedger
from .schema import CacheSchema


class RequestTable:
    """Which slots hold a request, how long it is and which blocks it owns.

    Every call that fails leaves it as it was.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: dict[str, int],
        schema_of: dict[str, CacheSchema],
        *,
        max_context_len: int,
        block_size: int,
        max_rollback: int,
    ):
        """num_blocks, schema_of: physical blocks and geometry of the kinds of layers that have blocks.

        max_context_len: tokens of one request at most. block_size: tokens that a block covers. max_rollback: tokens
        that can be forgotten.
        """
        self.num_slots, self.schema_of = num_slots, schema_of
        self.max_context_len, self.block_size, self.max_rollback = max_context_len, block_size, max_rollback
        self.ledger = BlockLedger(num_blocks)
        self.lengths: dict[int, int] = {}
        self._longest: dict[int, int] = {}  # most tokens the request ever had
        self.free_slots = list(range(num_slots))

    @property
    def slots(self) -> list[int]:
        """Slots with a request, ascending."""
        return self.ledger.slots

    def require(self, slot: int) -> None:
        """ValueError unless `slot` holds a request."""
        if slot not in self.ledger:
            raise ValueError(f"slot {slot} holds no request: slots in use are {self.slots}")

    def open(self) -> int:
        """A request without tokens or blocks -> the lowest free slot. RuntimeError when all are taken."""
        slot = self.take_slot()
        self.ledger.open(slot)
        self.lengths[slot] = self._longest[slot] = 0
        return slot

    def take_slot(self) -> int:
        """The lowest free slot, no longer free. RuntimeError when there is none."""
        if not self.free_slots:
            raise RuntimeError(
                f"all {self.num_slots} concurrent requests are running: release one or make max_concurrent_requests "
                "larger"
            )
        return heapq.heappop(self.free_slots)

    def close(self, slot: int) -> None:
        """Ends a request: its share of its blocks and the slot are free again."""
        self.ledger.close(slot)
        del self.lengths[slot], self._longest[slot]
        heapq.heappush(self.free_slots, slot)

    def fork(self, slot: int, shared: dict[str, int]) -> tuple[int, dict[str, list[tuple[int, int]]]]:
        """A second request as long as `slot` -> its slot, and `BlockLedger.fork`'s copies. RuntimeError as there."""
        target = self.take_slot()
        try:
            copies = self.ledger.fork(slot, target, shared)
        except RuntimeError:
            heapq.heappush(self.free_slots, target)
            raise
        self.lengths[target], self._longest[target] = self.lengths[slot], self._longest[slot]
        return target, copies

    def resize(self, lengths: dict[int, int]) -> None:
        """Gives slots the lengths that their requests have now."""
        self.lengths.update(lengths)
        for slot, n in lengths.items():
            self._longest[slot] = max(self._longest[slot], n)

    def settled(self, slot: int) -> int:
        """Tokens of `slot` that no rollback can take back, so that nothing writes there again.

        Ring and tails have room for `max_rollback` tokens more than a step needs, counted from the newest token the
        request ever had: an older row may be overwritten, and going back does not bring it back.
        """
        return max(self._longest[slot] - self.max_rollback, 0)

    def blocks_for(self, num_tokens: int) -> dict[str, int]:
        """Blocks that so many tokens of one request need, by kind."""
        return {kind: schema.blocks_for(num_tokens) for kind, schema in self.schema_of.items()}

    def missing(self, kind: str, slot: int, num_tokens: int) -> int:
        """Blocks that `slot` lacks to hold so many tokens (at most max_context_len)."""
        needed = self.schema_of[kind].blocks_for(min(num_tokens, self.max_context_len))
        return max(needed - len(self.ledger.blocks(slot)[kind]), 0)
