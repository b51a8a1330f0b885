"""Requests come, go, branch, go back, leave the cache and return."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .counts import count, is_integer
from .holder import CacheHolder, whole
from .host.blocks import rows_array
from .host.prefix import AdmittedPrompt
from .host.slot import Slot
from .kv_cache import KVCache
from .transfer.copies import copy_slot
from .transfer.slots import enter_cells
from .transfer.snapshot import Snapshot, require_fit, take_snapshot, write_entries
from .transfer.state_rows import read_rows, write_rows


class RequestLifecycle(CacheHolder):
    """What may happen to a request; every call succeeds as a whole or changes nothing."""

    @whole
    def admit_request(self) -> Slot:
        """A request without tokens -> its slot, that which has been free longest. RuntimeError when all are taken."""
        self._settle(wait=not self._requests.free_slots)
        return self._requests.open()

    @whole
    def admit_prompt(self, token_ids: Any, *, salt: bytes = b"") -> AdmittedPrompt:
        """A request for a prompt, which goes on from the longest beginning that `keep_prefix` kept under the same salt.

        token_ids: (n,) integers. Feed the tokens from `start` on, at least one; the last one's logits are those of a
        prompt computed from its beginning. A manager without a prefix policy finds nothing. Raises ValueError for a
        prompt that is empty or longer than max_context_len, RuntimeError when no slot is free; then nothing changed.
        """
        ids = _token_array(token_ids)
        if not 0 < len(ids) <= self._requests.max_context_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens: expected 1 to {self._requests.max_context_len} (max_context_len)"
            )
        self._settle(wait=not self._requests.free_slots)
        if self._prefix is None:
            return AdmittedPrompt(self._requests.open(), 0, 0, 0)
        keys = self._prefix.keys(ids[:-1], salt)  # a token is left to be fed
        match = self._prefix.match(keys, self._ledger.kinds)
        if match is None:
            return AdmittedPrompt(self._requests.open(), 0, 0, 0)
        cache = self._live_cache()
        slot = self._fill(self._requests.adopt(match.blocks, match.start))
        self._cache = write_rows(cache, slot, match.state or {}, match.start)
        self._cache = enter_cells(self._cache, self._ledger.all_entered(slot))
        return AdmittedPrompt(slot, match.start, match.hit_tokens, match.hit_tokens - match.start)

    def shareable_blocks(self, token_ids: Any, *, salt: bytes = b"") -> dict[str, int]:
        """By how many blocks `admit_prompt` would leave more free than a prompt needs that shares nothing.

        Args:
          token_ids: (n,) integers, a prompt.
          salt: as for `admit_prompt`.

        Returns:
          By kind, blocks that other requests hold and the prompt begins with. Kept blocks that nobody holds do not
          count: `num_free_blocks` counts them as free. Nothing changes.
        """
        shared = dict.fromkeys(self._ledger.kinds, 0)
        if self._prefix is None:
            return shared
        match = self._prefix.match(self._prefix.keys(_token_array(token_ids)[:-1], salt), self._ledger.kinds, peek=True)
        if match is not None:
            kept_only = self._ledger.kept_only()
            for kind in shared:
                shared[kind] = int((~kept_only[kind][match.blocks[kind]]).sum())
        return shared

    def found_tokens(self, token_ids: Any, *, salt: bytes = b"") -> int:
        """How many tokens of a prompt `admit_prompt` would find in kept blocks; nothing changes."""
        if self._prefix is None:
            return 0
        match = self._prefix.match(self._prefix.keys(_token_array(token_ids)[:-1], salt), self._ledger.kinds, peek=True)
        return 0 if match is None else match.hit_tokens

    @whole
    def reset(self) -> None:
        """Begins anew with an empty cache, after the one there was is lost: donated to a step that failed.

        All requests end, their handles are errors from now on, and nothing is kept of prompts.
        """
        old, cache = self._requests, self._cache
        fresh = KVCache.allocate(
            cache.schemas,
            cache.max_requests,
            {kind: pool.num_blocks for kind, pool in cache.paged.items()},
            {kind: table.shape[1] for kind, table in cache.block_table.items()},
        )
        requests = old.emptied()
        prefix = None if self._prefix is None else self._prefix.emptied()
        if prefix is not None:
            prefix.undo = requests.undo
        # One assignment: whatever interrupts this finds the old state or the new one.
        vars(self).update(
            _cache=fresh, _requests=requests, _ledger=requests.ledger, _prefix=prefix, _chains={}, _opening=None,
        )  # fmt: skip
        old.pending.forget_all()
        if self._debug_nan:
            free = {kind: requests.ledger.free_blocks(kind) for kind in requests.ledger.kinds}
            self._make_unreadable(free, range(fresh.max_requests))

    @whole
    def keep_prefix(self, slot: int, token_ids: Any, *, salt: bytes = b"") -> int:
        """Keeps the full blocks of a request for prompts that begin alike -> how many tokens they hold.

        token_ids: the request's tokens, or the first of them that are to be kept. What the policy keeps beside the
        blocks is read from the device where ring and tails still have it: call this when the request's length is a
        multiple of block_size, or at most max_rollback tokens later. The request cannot go back into kept blocks any
        more. Without a prefix policy, and under another salt than the request's blocks are kept already, nothing is.
        Raises ValueError for a slot without a request or with a planned step not dispatched.
        """
        self._require_written(slot)
        if self._prefix is None:
            return 0
        cache = self._live_cache()
        ids = _token_array(token_ids)[: self._requests.length(slot)]
        number, size = int(slot), self.block_size
        made_for, known = self._chains.get(number, (None, []))
        owner = (self._requests.handle(number).generation, salt)
        keys = self._prefix.keys(ids, salt, known[: len(ids) // size] if made_for == owner else ())
        # A block is one text's: what a request shares with a text under another salt is not kept once more.
        if self._ledger.any_kept(slot, self._prefix.num_known(keys), len(keys)):
            return 0
        settled = self._requests.settled(slot)
        ends = range(max(-(-settled // size), 1) * size, len(keys) * size + 1, size)
        self._ledger.keep(self._prefix.add(keys, self._ledger.blocks(slot)))
        for end in ends:
            if self._prefix.lacks_state(keys[end // size - 1], end):
                self._prefix.keep_state(keys[end // size - 1], read_rows(cache, slot, end, end))
        self._requests.settle_at(slot, len(keys) * size)
        self._requests.undo.item(self._chains, number)
        self._chains[number] = owner, keys
        return len(keys) * size

    @whole
    def release_request(self, slot: int) -> None:
        """Ends the request of `slot`, at any moment: its blocks and the slot are free again.

        Where a planned step was not dispatched yet, they are free once it is. Raises ValueError if the slot has none.
        """
        self._requests.require(slot)
        self._requests.close(slot)
        self._settle()

    @whole
    def rollback(self, slot: int, n: int) -> None:
        """Forgets the last n tokens of a request; blocks no longer needed are free again. O(blocks), nothing is copied.

        What is written next is as if they had never been there: their rows lie in the slack of ring and tails, and
        readers go by position. Raises ValueError for n beyond the request's length, or for going back further than
        max_rollback tokens from the newest that it ever had.
        """
        self._requests.require(slot)
        if not is_integer(n):
            raise ValueError(f"the number of tokens is {n!r}: expected an integer, 0 or more")
        length = self._length(slot)
        most = max(length - self._requests.settled(slot), 0)
        if not 0 <= n <= most:
            raise ValueError(
                f"slot {slot}: cannot roll back {n} tokens: it has {length} and max_rollback is {self.max_rollback}, "
                f"counted from the newest token it ever had: expected 0 to {most}"
            )
        self._requests.shrink(slot, length - int(n))
        self._settle()

    @whole
    def fork(self, slot: int) -> Slot:
        """A second request with the same tokens so far -> its slot; the two go on independently.

        Blocks that neither will write again are shared by reference count, the others and the state row are copied.
        Raises ValueError for a slot without a request or with a planned step not dispatched, RuntimeError when no slot
        or too few blocks are free; then nothing changed.
        """
        self._require_written(slot)
        self._live_cache()
        self._settle(wait=bool(self._requests.waiting))
        settled = self._requests.settled(slot) // self.block_size
        owned = self._ledger.blocks(slot)
        shared = {kind: min(settled, len(ids)) for kind, ids in owned.items()}
        if self._requests.free_slots:
            self._make_room({kind: {slot: len(ids) - shared[kind]} for kind, ids in owned.items()})
        target, copies = self._requests.fork(slot, shared)
        # At most the open block and what a rollback reaches back to: a fixed number, so that forks compile once.
        most = -(-self.max_rollback // self.block_size) + 1
        self._fill(target)
        pairs = {kind: jnp.asarray(rows_array(rows, most, 2)) for kind, rows in copies.items()}
        self._cache = copy_slot(self._cache, jnp.int32(slot), jnp.int32(target), pairs)
        return target

    @whole
    def snapshot(self, slot: int, *, rollback: int = 0) -> Snapshot:
        """The request of `slot` outside the cache, in numpy arrays; the request goes on. Waits for steps in flight.

        rollback: tokens that can be forgotten after it is restored; what that takes is part of the snapshot. Raises
        ValueError for a slot without a request or with a planned step not dispatched, or for more rollback than the
        request has.
        """
        return self._take_snapshot(slot, rollback)

    def _take_snapshot(self, slot: int, rollback: int) -> Snapshot:
        self._require_written(slot)
        rollback = count("rollback", rollback)
        length = self._requests.length(slot)
        most = length - self._requests.settled(slot)
        if rollback > most:
            raise ValueError(f"rollback is {rollback}: slot {slot} can go back by 0 to {most} tokens")
        return take_snapshot(
            self._live_cache(), slot, length, self._ledger.blocks(slot), rollback=rollback, fingerprint=self.fingerprint
        )

    @whole
    def restore(self, snapshot: Snapshot) -> Slot:
        """A request that goes on where the snapshot was taken, on this manager or one of another size -> its slot.

        It can be rolled back by the snapshot's `rollback`, at most by this manager's. Raises ValueError, with the
        reason, for a snapshot of another model or other records or longer than max_context_len, RuntimeError when no
        slot or too few blocks are free; then nothing changed.
        """
        self._live_cache()
        self._settle(wait=bool(self._requests.waiting))
        require_fit(snapshot, self._cache, self.fingerprint, self.max_context_len)
        settled = snapshot.length - min(snapshot.rollback, self.max_rollback)
        if self._requests.free_slots:
            self._make_room({kind: {0: n} for kind, n in self._requests.blocks_for(snapshot.length).items()})
        slot = self._fill(self._requests.open(snapshot.length, settled))
        for cache in write_entries(self._cache, snapshot, self._ledger.blocks(slot)):
            self._cache = cache
        self._cache = write_rows(self._cache, slot, snapshot.arrays, snapshot.length)
        self._cache = enter_cells(self._cache, self._ledger.all_entered(slot))
        return slot

    def _require_written(self, slot: int) -> None:
        """See `RequestTable.require_written`; asks the cache first, where that matters."""
        self._requests.require(slot)
        if self._requests.pending.involves(slot):
            self._look(wait=True)
        self._requests.require_written(slot)

    def check_restorable(self, snapshot: Snapshot) -> None:
        """ValueError, with the reason, for a snapshot that `restore` would refuse whatever is free."""
        require_fit(snapshot, self._cache, self.fingerprint, self.max_context_len)

    @whole
    def preempt(self, slot: int, *, rollback: int = 0) -> Snapshot:
        """Takes a request out of the cache to make room; `restore` resumes it. See `snapshot`, `release_request`."""
        snapshot = self._take_snapshot(slot, rollback)
        # What it gives up is free with the next call that looks for room: no work on the device, which could fail,
        # stands between the request's end and the snapshot.
        self._requests.close(slot)
        return snapshot

    @whole
    def advance(self, slot: int, n: int) -> None:
        """Counts n tokens more for `slot`, which a loop wrote beyond its plan (see `plan_step`'s lookahead).

        A loop that wrote more than it keeps counts all of them, then rolls the rest back.
        """
        length = self._length(slot)
        end = length + count("the number of tokens", n)
        if end > self.max_context_len:
            raise ValueError(
                f"slot {slot}: {n} tokens more than {length}: a request has at most {self.max_context_len} "
                "(max_context_len)"
            )
        for kind in self._ledger.kinds:
            if self._requests.missing(kind, slot, end):
                raise ValueError(f"slot {slot}: {end} tokens need {kind.upper()} blocks that no plan gave out")
        self._requests.grow(slot, end)


def _token_array(token_ids: Any) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids are {ids.dtype}{ids.shape}: expected integers (n,)")
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 31):  # in 32 bits they would be the text of another
        raise ValueError(f"token_ids reach from {ids.min()} to {ids.max()}: expected 0 to {(1 << 31) - 1}")
    return ids.astype(np.int32)
