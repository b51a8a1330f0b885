"""Prompts that begin like earlier ones: which blocks hold their tokens, and what is needed to continue from there.

A block is found by a hash of the model, a salt and all tokens up to its end: equal blocks after different beginnings,
of different models or under different salts are different blocks. Entries alone do not let a request continue. It also
needs the last window - 1 ring rows of every layer and, where compressed windows overlap, lane a of the last one. What
there is of that, a policy says:

- "full": that state is kept at the end of every block; nothing is computed again.
- "periodic": only at multiples of `period` tokens; what follows the last of them is computed again.
- "zero": never. A layer's row at a position follows from window - 1 rows before it in the layer below and from entries,
  and those are all there. So after (window - 1) * layers tokens, computed again from nothing, the rows are exactly what
  they would be. The entries that this computes on the way are not, and are not written (`StepPlan.kept_blocks`). A
  prompt that is found no further than that is computed from its beginning.
"""

import dataclasses
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..counts import count
from ..schema import CacheSchema
from .slot import Slot
from .undo import NO_UNDO, Undo

POLICIES = ("full", "periodic", "zero")

State = dict[str, np.ndarray]
"""Rows of ring and tails by name, as `state_rows.read_rows` returns them."""


@dataclasses.dataclass(frozen=True)
class PrefixPolicy:
    """What is kept beside blocks so that a request can continue from them.

    "full" spares all computing and keeps ring and tails for every block; "zero" keeps nothing but blocks and computes
    some window * layers tokens again; "periodic" lies between. The manager that gets one checks it.
    """

    name: str  # "full" | "periodic" | "zero"
    period: int = 1024  # tokens, for "periodic": a multiple of the block size
    max_state_bytes: int = 1 << 30  # of host memory for all states; the last state of a text stays longest

    def check(self, block_size: int) -> None:
        """ValueError for a policy that is not known or a period that blocks do not make up."""
        if self.name not in POLICIES:
            raise ValueError(f"prefix policy {self.name!r} is not known: expected one of {', '.join(POLICIES)}")
        if self.name == "periodic" and (self.period < 1 or self.period % block_size):
            raise ValueError(f"period is {self.period}: expected a multiple of the block's {block_size} tokens")
        count("max_state_bytes", self.max_state_bytes)

    def keeps_state(self, length: int) -> bool:
        """Whether state is kept at this multiple of the block size."""
        return self.name == "full" or (self.name == "periodic" and length % self.period == 0)


def check_salt(salt: Any) -> None:
    """ValueError for what is no salt."""
    if not isinstance(salt, bytes):
        raise ValueError(f"salt is {salt!r}: expected bytes")


def token_array(token_ids: Any) -> np.ndarray:
    """token_ids as (n,) int32; ValueError for what is no text."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids are {ids.dtype}{ids.shape}: expected integers (n,)")
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 31):  # in 32 bits they would be the text of another
        raise ValueError(f"token_ids reach from {ids.min()} to {ids.max()}: expected 0 to {(1 << 31) - 1}")
    return ids.astype(np.int32)


class AdmittedPrompt(NamedTuple):
    """A request for a prompt: tokens from `start` on are to be fed to it."""

    slot: Slot
    start: int
    hit_tokens: int  # tokens of the prompt whose blocks were found
    recomputed_tokens: int  # of these, tokens that are computed again: hit_tokens - start


class Match(NamedTuple):
    """What of a prompt is there: blocks by kind for `hit_tokens`, and state (None: nothing) at `start`."""

    hit_tokens: int
    start: int
    blocks: dict[str, list[int]]
    state: State | None


@dataclasses.dataclass
class _Node:
    """One block of one text."""

    parent: bytes
    blocks: dict[str, int]
    state: State | None = None
    children: int = 0
    last_used: int = 0
    state_used: int = 0  # when its state was last kept or gone on from


def recomputation_reach(schemas: Sequence[CacheSchema]) -> int:
    """Tokens before a point that, computed again from nothing, give every layer the state it has there.

    schemas: one a layer. The first layer's rows follow from the tokens alone; each further layer needs the rows of
    window - 1 tokens before those it shall have right.
    """
    window = schemas[0].swa_window_size
    overlap = max((s.compress_ratio for s in schemas if s.overlap), default=0)
    return (window - 1) * (len(schemas) - 1) + max(window - 1, overlap)


class PrefixIndex:
    """The blocks of earlier prompts by content. Host bookkeeping only: who owns blocks, the ledger knows."""

    def __init__(self, policy: PrefixPolicy, fingerprint: str, block_size: int, reach: int):
        """reach: tokens that policy "zero" computes again before a point to get its state."""
        policy.check(block_size)
        self.policy, self._block_size, self._reach = policy, block_size, reach
        self._root = hashlib.blake2b(fingerprint.encode(), digest_size=32).digest()
        self._nodes: dict[bytes, _Node] = {}
        self._by_age: list[tuple[int, bytes]] = []  # heap of (last used, key); what is outdated in it is skipped
        self._clock = 0
        self._with_state: set[bytes] = set()
        self.state_bytes = 0
        self._chains: dict[int, tuple[tuple[int, bytes] | None, list[bytes]]] = {}  # keys of requests' blocks, by slot
        self.undo: Undo = NO_UNDO  # takes note of every change but of when something was used

    def keys(self, token_ids: np.ndarray, salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
        """The key of every full block of token_ids (n,) int32; those of the first blocks may be known."""
        check_salt(salt)
        salted = hashlib.blake2b(salt, key=self._root, digest_size=32).digest()
        keys = list(known)
        for end in range((len(keys) + 1) * self._block_size, len(token_ids) + 1, self._block_size):
            tokens = token_ids[end - self._block_size : end].astype("<i4").tobytes()
            keys.append(hashlib.blake2b(tokens, key=keys[-1] if keys else salted, digest_size=32).digest())
        return keys

    def keys_of(self, slot: Slot, token_ids: np.ndarray, salt: bytes) -> list[bytes]:
        """`keys` of a request's tokens, of which `note_keys` may know the first."""
        owner, known = self._chains.get(int(slot), (None, []))
        known = known if owner == (slot.generation, salt) else []
        return self.keys(token_ids, salt, known[: len(token_ids) // self._block_size])

    def note_keys(self, slot: Slot, salt: bytes, keys: list[bytes]) -> None:
        """These are the keys of a request's first blocks."""
        self.undo.item(self._chains, int(slot))
        self._chains[int(slot)] = (slot.generation, salt), keys

    def emptied(self) -> "PrefixIndex":
        """An index of the same policy and model that knows nothing."""
        fresh = PrefixIndex(self.policy, "", self._block_size, self._reach)
        fresh._root = self._root
        return fresh

    def find(self, token_ids: np.ndarray, salt: bytes, kinds: Sequence[str], *, peek: bool = False) -> Match | None:
        """`match` of a prompt, of which a token is left to be fed."""
        return self.match(self.keys(token_ids[:-1], salt), kinds, peek=peek)

    def match(self, keys: Sequence[bytes], kinds: Sequence[str], *, peek: bool = False) -> Match | None:
        """What is there of a prompt with these keys; None where nothing spares any computing.

        peek: it does not count as used.
        """
        found = [self._nodes[key] for key in keys[: self.num_known(keys)]]
        blocks = len(found)
        while blocks and found[blocks - 1].state is None and self.policy.name != "zero":
            blocks -= 1
        state = found[blocks - 1].state if blocks else None
        hit, start = len(found) * self._block_size, blocks * self._block_size
        if self.policy.name == "zero":
            blocks = len(found)  # entries are not computed again
            start = max(hit - self._reach, 0) // self._block_size * self._block_size
        if not start:
            return None
        if not peek:
            self._touch(keys[len(found) - 1])
            found[blocks - 1].state_used = self._clock
        return Match(hit, start, {kind: [n.blocks[kind] for n in found[:blocks]] for kind in kinds}, state)

    def num_known(self, keys: Sequence[bytes]) -> int:
        """How many of the first of these keys are known."""
        return next((i for i, key in enumerate(keys) if key not in self._nodes), len(keys))

    def add(self, keys: Sequence[bytes], blocks: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Takes note of a request's first len(keys) blocks -> by kind those that were not known, to be owned."""
        new: dict[str, list[int]] = {kind: [] for kind in blocks}
        for i, key in enumerate(keys):
            if key in self._nodes:
                continue
            parent = keys[i - 1] if i else b""
            self.undo.item(self._nodes, key)
            self._nodes[key] = _Node(parent, {kind: ids[i] for kind, ids in blocks.items()})
            if parent:
                self.undo.attributes(self._nodes[parent], "children")
                self._nodes[parent].children += 1
            for kind, ids in blocks.items():
                new[kind].append(ids[i])
        if keys:
            self._touch(keys[-1])
        return new

    def lacks_state(self, key: bytes, length: int) -> bool:
        """Whether state is to be kept at the end of this block, and is not."""
        return self.policy.keeps_state(length) and self._nodes[key].state is None

    def keep_state(self, key: bytes, state: State) -> None:
        """Keeps state at the end of a block; where that is too much, others go (see `_next_to_forget`)."""
        node = self._nodes[key]
        self._forget_state(key)
        self._clock += 1
        self.undo.attributes(node, "state", "state_used")
        self.undo.attributes(self, "state_bytes")
        self.undo.note(self._with_state.discard, key)
        node.state, node.state_used = state, self._clock
        self._with_state.add(key)
        self.state_bytes += _nbytes(state)
        if self.state_bytes > self.policy.max_state_bytes:
            for gone in self._next_to_forget():
                self._forget_state(gone)
                if self.state_bytes <= self.policy.max_state_bytes:
                    break

    def _next_to_forget(self) -> list[bytes]:
        """Blocks with state, in the order in which states go.

        A conversation continues from the last state of its text; the states before it serve only texts that part there.
        So states with a later one in the same text go first, unless texts part right after them; the others only when
        none of those is left. Among either, the least recently used goes first.
        """
        followed = set()
        for key in self._with_state:
            parent = self._nodes[key].parent
            while parent and parent not in self._with_state:
                parent = self._nodes[parent].parent
            if parent and self._nodes[parent].children == 1:
                followed.add(parent)
        return sorted(self._with_state, key=lambda key: (key not in followed, self._nodes[key].state_used))

    def evict(self, owned_elsewhere: Mapping[str, np.ndarray], short: Mapping[str, int]) -> dict[str, list[int]]:
        """Forgets the least recently used texts until short[kind] blocks are nobody's -> what is forgotten, by kind.

        owned_elsewhere[kind]: (blocks,) bool. Ends of texts go before their beginnings. An end that a request owns goes
        only where nothing else is left and a beginning before it is nobody's: one that the request has a block of its
        own for, because it was computed twice.
        """
        self.undo.attributes(self, "_by_age")
        self._by_age = list(self._by_age)
        gone: dict[str, list[int]] = {kind: [] for kind in owned_elsewhere}
        missing, in_use = dict(short), []

        def owned(node: _Node) -> bool:
            return any(owned_elsewhere[kind][block] for kind, block in node.blocks.items())

        while any(n > 0 for n in missing.values()):
            if self._by_age:
                item = heapq.heappop(self._by_age)
                node = self._nodes.get(item[1])
                if node is None or node.children or node.last_used != item[0]:
                    continue
                if owned(node):
                    in_use.append(item)
                    continue
            else:
                hidden = next((i for i in in_use if any(not owned(n) for n in self._before(self._nodes[i[1]]))), None)
                if hidden is None:
                    break
                item = hidden
                in_use.remove(item)
                node = self._nodes[item[1]]
            for kind, block in node.blocks.items():
                gone[kind].append(block)
                if kind in missing and not owned_elsewhere[kind][block]:
                    missing[kind] -= 1
            self._remove(item[1])
        for item in in_use:
            heapq.heappush(self._by_age, item)
        return gone

    def _before(self, node: _Node) -> Iterator[_Node]:
        """The blocks of the text before this one, the last first."""
        while node.parent:
            node = self._nodes[node.parent]
            yield node

    def _remove(self, key: bytes) -> None:
        self._forget_state(key)
        self.undo.item(self._nodes, key)
        node = self._nodes.pop(key)
        if node.parent:
            parent = self._nodes[node.parent]
            self.undo.attributes(parent, "children", "last_used")
            parent.children -= 1
            parent.last_used = max(parent.last_used, node.last_used)
            heapq.heappush(self._by_age, (parent.last_used, node.parent))

    def _forget_state(self, key: bytes) -> None:
        node = self._nodes[key]
        self.undo.attributes(node, "state")
        self.undo.attributes(self, "state_bytes")
        if key in self._with_state:
            self.undo.note(self._with_state.add, key)
        self.state_bytes -= _nbytes(node.state or {})
        node.state = None
        self._with_state.discard(key)

    def _touch(self, key: bytes) -> None:
        clock = self._clock + 1  # in an order in which every end is in the heap at any time
        heapq.heappush(self._by_age, (clock, key))
        self._clock = self._nodes[key].last_used = clock
        if len(self._by_age) > 2 * len(self._nodes) + 64:
            by_age = [(node.last_used, key) for key, node in self._nodes.items() if not node.children]
            heapq.heapify(by_age)
            self._by_age = by_age

    def blocks(self) -> dict[str, list[int]]:
        """All blocks that are known, by kind."""
        blocks: dict[str, list[int]] = {}
        for node in self._nodes.values():
            for kind, block in node.blocks.items():
                blocks.setdefault(kind, []).append(block)
        return blocks

    def check(self) -> None:
        """AssertionError unless texts are whole and every end of one can be evicted."""
        children = dict.fromkeys(self._nodes, 0)
        for node in self._nodes.values():
            if node.parent:
                children[node.parent] += 1
        assert children == {key: node.children for key, node in self._nodes.items()}, "prefix blocks"
        reachable = set(self._by_age)
        ends = [(node.last_used, key) for key, node in self._nodes.items() if not node.children]
        assert all(end in reachable for end in ends), "a prefix that cannot be evicted"
        assert self.state_bytes == sum(_nbytes(node.state or {}) for node in self._nodes.values()), "state bytes"
        assert self._with_state == {key for key, node in self._nodes.items() if node.state is not None}, "states"


def _nbytes(state: State) -> int:
    return sum(x.nbytes for x in state.values())
