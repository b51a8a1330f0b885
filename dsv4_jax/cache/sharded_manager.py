"""The host's side of a cache over a mesh: a manager for each shard, and above them one that spreads requests."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from .counts import is_integer
from .holder import cache_size
from .host.planning import StepSizes
from .host.prefix import AdmittedPrompt, PrefixPolicy
from .host.slot import Slot
from .kv_cache import KVCache
from .manager import KVCacheManager, ManagerOptions
from .plan import StepPlan
from .sharding import (
    DATA,
    check_mesh,
    has_context_mesh,
    is_joined,
    join_caches,
    no_context_mesh,
    shard_devices,
    shard_sharding,
    split_cache,
)
from .transfer.snapshot import Snapshot

P = ParamSpec("P")
T = TypeVar("T")


class ShardError(RuntimeError):
    """Slots or blocks of a shard do not suffice.

    Attributes:
      shard: its number.
    """

    def __init__(self, shard: int, message: str):
        super().__init__(message)
        self.shard = shard


def _of_shard(
    method: Callable[Concatenate[KVCacheManager, int, P], T], note: str = ""
) -> Callable[Concatenate["ShardedKVCacheManager", int, P], T]:
    """The method of the shard that a slot belongs to."""

    @functools.wraps(method)
    def call(self: "ShardedKVCacheManager", slot: int, *arguments: P.args, **options: P.kwargs) -> T:
        shard = self.shard_of(slot)
        return self._on(shard, lambda: method(self.shards[shard], self._own_slot(slot), *arguments, **options))

    call.__doc__ = f"As `KVCacheManager.{method.__name__}`{note and '; '}{note}."
    return call


class ShardedKVCacheManager:
    """Spreads requests over the devices of a mesh; for each it is what a KVCacheManager is.

    Every shard has a KVCacheManager of its own, whose cache lies on the shard's device: what happens to a request
    between steps touches that device alone. `cache` is the parts of all shards as one, for a step; assigning the step's
    result hands each shard its part. A slot is a number over all shards of this process: that of slot s of shard i is
    i * slots_per_shard + s. A request stays on its shard, and its forks and prefix hits with it; a snapshot is restored
    on any.

    With several processes each has the shards of its own devices, and numbers them from 0; steps are taken together.

    Attributes:
      mesh: the mesh, axes of type Auto.
      shards: the managers of this process's shards. Their slots are numbered from 0 each.
    """

    def __init__(self, config: Any, schedule: Sequence[Any], *, mesh: Mesh, **options: Unpack[ManagerOptions]):
        """Allocates a cache on every device of the mesh.

        Args:
          config, schedule: the model, as for KVCacheManager.
          mesh: with an axis "data", over which requests are spread; along an axis "model" caches are replicated.
          **options: the others of KVCacheManager; sizes are those of one shard.

        Raises:
          ValueError: as KVCacheManager does, and for a mesh that `check_mesh` refuses.
        """
        self._begin(mesh, lambda: KVCacheManager(config, schedule, **options))

    @classmethod
    def over(cls, mesh: Mesh, make: Callable[[], KVCacheManager]) -> "ShardedKVCacheManager":
        """A manager whose shards are what `make` returns, called once for each with its device as the default one.

        So the other ways to make a KVCacheManager serve too: `over(mesh, lambda: KVCacheManager.from_memory(...))`.
        """
        if not callable(make):
            raise ValueError(
                f"over: make is a {type(make).__name__}: expected a function that returns a KVCacheManager"
            )
        manager = cls.__new__(cls)
        manager._begin(mesh, make)
        return manager

    def _begin(self, mesh: Mesh, make: Callable[[], KVCacheManager]) -> None:
        self.mesh = check_mesh(mesh)
        self._devices = shard_devices(self.mesh)
        if not self._devices:
            raise ValueError("the mesh has no device of this process: expected some of each process's")
        shards: list[KVCacheManager] = []
        for devices in self._devices:
            with no_context_mesh(), jax.default_device(devices[0]):
                shard: Any = make()
                self._check_made(shard, shards)
                self._commit(shard, devices)
            shards.append(shard)
        self.shards = tuple(shards)
        self.config = self.shards[0].config
        self._joined: tuple[KVCache, list[KVCache]] | None = None  # the whole, and the parts it was made of

    @staticmethod
    def _check_made(shard: Any, others: list[KVCacheManager]) -> None:
        if not isinstance(shard, KVCacheManager):
            raise ValueError(
                f"over: make returned a {type(shard).__name__}: expected a KVCacheManager for each shard, such as "
                "KVCacheManager.create returns"
            )
        if any(shard is other for other in others):
            raise ValueError(
                "over: make returned a manager that it had returned before: expected another for each shard"
            )
        if others and cache_size(shard.cache) != cache_size(others[0].cache):
            raise ValueError("over: make returned managers of different sizes: expected the same cache for each shard")

    @staticmethod
    def _commit(shard: KVCacheManager, devices: list[jax.Device]) -> None:
        """Ties a shard's arrays to its devices, which are new and in no plan; on one device nothing is copied."""
        shard.cache = jax.device_put(shard.cache, shard_sharding(devices))

    # The cache.

    @property
    def cache(self) -> KVCache:
        """The parts of all shards as one cache, sharded over the mesh. Assigning a step's result hands it to them."""
        parts = [shard.cache for shard in self.shards]
        if self._joined is None or any(a is not b for a, b in zip(parts, self._joined[1], strict=True)):
            self._joined = join_caches(parts, self.mesh), parts
        return self._joined[0]

    @cache.setter
    def cache(self, cache: KVCache) -> None:
        given: Any = cache
        old = self.cache
        if not isinstance(given, KVCache) or cache_size(given) != cache_size(old):
            what = "a cache of another size or form" if isinstance(given, KVCache) else f"a {type(given).__name__}"
            raise ValueError(f"manager.cache got {what}: expected the cache that its step returned")
        if not is_joined(cache, old):
            raise ValueError(
                "manager.cache got a cache that lies elsewhere than on its mesh, slots and blocks split over "
                f'"{DATA}": expected a step that leaves it there, such as out_shardings or a jax.shard_map do'
            )
        parts = split_cache(cache, self.mesh)
        self._joined = cache, parts
        for shard, part in zip(self.shards, parts, strict=True):
            shard.cache = part

    def memory_bytes(self) -> int:
        """Bytes of device memory that this process's shards hold, copies along "model" not counted."""
        return sum(shard.memory_bytes() for shard in self.shards)

    def reset(self) -> None:
        """Begins anew with empty caches on all shards, after they were lost in a step that failed."""
        for shard, devices in zip(self.shards, self._devices, strict=True):
            with no_context_mesh(), jax.default_device(devices[0]):
                shard.reset()
                self._commit(shard, devices)

    def check(self) -> None:
        """AssertionError unless every shard's books and arrays fit together. Reads the devices: for tests."""
        for shard in self.shards:
            shard.check()

    # Sizes: those of a request are the same on every shard.

    @property
    def num_shards(self) -> int:
        """Shards of this process."""
        return len(self.shards)

    @property
    def slots_per_shard(self) -> int:
        """Slots of one shard."""
        return self.shards[0].max_concurrent_requests

    @property
    def max_concurrent_requests(self) -> int:
        """Slots of this process's shards together."""
        return self.num_shards * self.slots_per_shard

    @property
    def max_context_len(self) -> int:
        """Tokens of one request at most."""
        return self.shards[0].max_context_len

    @property
    def max_rollback(self) -> int:
        """Tokens that a request can forget at most."""
        return self.shards[0].max_rollback

    @property
    def block_size(self) -> int:
        """Tokens a block covers."""
        return self.shards[0].block_size

    @property
    def prefix_policy(self) -> PrefixPolicy | None:
        """What each shard keeps of prompts for others that begin alike."""
        return self.shards[0].prefix_policy

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self.shards[0].fingerprint

    def num_free_blocks(self, kind: str) -> int:
        """Blocks that can be given out now, of this process's shards together; a request takes those of its shard."""
        return sum(shard.num_free_blocks(kind) for shard in self.shards)

    # Where requests are.

    @property
    def active_slots(self) -> list[Slot]:
        """Slots of admitted requests, ascending."""
        return [self._whole_slot(i, slot) for i, shard in enumerate(self.shards) for slot in shard.active_slots]

    def shard_of(self, slot: int) -> int:
        """The number of the shard that a slot belongs to; ValueError for no slot of this manager."""
        if not is_integer(slot):
            raise ValueError(f"slot is {slot!r}: expected an integer, as admission returns it")
        if not 0 <= slot < self.max_concurrent_requests:
            raise ValueError(f"slot {slot} holds no request: this manager has {self.max_concurrent_requests} slots")
        return int(slot) // self.slots_per_shard

    def _own_slot(self, slot: int) -> int:
        """The slot in the numbering of its shard."""
        number = int(slot) % self.slots_per_shard
        return Slot(number, slot.generation) if isinstance(slot, Slot) else number

    def _whole_slot(self, shard: int, slot: Slot) -> Slot:
        return Slot(shard * self.slots_per_shard + slot, slot.generation)

    def _on(self, shard: int, call: Callable[[], T]) -> T:
        """Calls a method of a shard; errors name the shard, whose slots they count from 0."""
        try:
            if has_context_mesh():
                with no_context_mesh():
                    return call()
            return call()  # with nothing after it: Ctrl-C must not lose what it returns
        except (ValueError, RuntimeError) as error:
            if self.num_shards == 1 or type(error) not in (ValueError, RuntimeError):
                raise
            message = f"shard {shard}: {error}"
            raise ValueError(message) if isinstance(error, ValueError) else ShardError(shard, message) from None

    def by_load(self) -> list[int]:
        """Shards in the order in which a request is placed: fewest requests first, then most free blocks."""

        def load(i: int) -> tuple[int, int, int]:
            shard = self.shards[i]
            free = [shard.num_free_blocks(kind) for kind in shard.cache.paged]
            return len(shard.active_slots), -min(free, default=0), i

        return sorted(range(self.num_shards), key=load)

    def by_prefix(self, token_ids: Any, *, salt: bytes = b"") -> list[int]:
        """Shards in the order in which a prompt is placed: most tokens found in kept blocks first, then by load."""
        if self.prefix_policy is None or self.num_shards == 1:
            return self.by_load()
        found = [shard.found_tokens(token_ids, salt=salt) for shard in self.shards]
        return sorted(self.by_load(), key=lambda i: -found[i])

    def _place(self, order: Iterable[int], call: Callable[[KVCacheManager], T]) -> T:
        """What a call that begins a request returns on the first shard in `order` where it succeeds, with the slot in
        the numbering of the whole; where all refuse, the first's error.

        A refusal changes nothing, so that only the shard that takes the request has changed.
        """
        first: RuntimeError | None = None
        for i in order:
            try:
                came: Any = self._on(i, lambda shard=self.shards[i]: call(shard))  # type: ignore[misc]
            except RuntimeError as error:
                first = first or error
                continue
            try:
                slot = came.slot if isinstance(came, AdmittedPrompt) else came
                whole: Any = Slot(i * self.slots_per_shard + slot, slot.generation)
                if isinstance(came, AdmittedPrompt):
                    whole = came._replace(slot=whole)
                return whole
            except BaseException:  # Ctrl-C, before anybody knows of the request
                self.shards[i].release_request(came.slot if isinstance(came, AdmittedPrompt) else came)
                raise
        assert first is not None
        raise first

    # Requests come and go.

    def admit_request(self, *, shard: int | None = None) -> Slot:
        """A slot on the shard with the least load, or on `shard`. Raises RuntimeError when all slots are taken."""
        return self._place(self._order(shard, self.by_load), KVCacheManager.admit_request)

    def admit_prompt(self, token_ids: Any, *, salt: bytes = b"", shard: int | None = None) -> AdmittedPrompt:
        """As `KVCacheManager.admit_prompt`, on the first of `by_prefix` that has a slot, or on `shard`."""
        order = self._order(shard, lambda: self.by_prefix(token_ids, salt=salt))
        return self._place(order, lambda manager: manager.admit_prompt(token_ids, salt=salt))

    def restore(self, snapshot: Snapshot, *, shard: int | None = None) -> Slot:
        """As `KVCacheManager.restore`, on the shard with the least load that has room, or on `shard`.

        The snapshot may come from any shard of any manager of the same model.
        """
        return self._place(self._order(shard, self.by_load), lambda manager: manager.restore(snapshot))

    def _order(self, shard: int | None, otherwise: Callable[[], list[int]]) -> list[int]:
        if shard is None:
            return otherwise()
        if not is_integer(shard) or not 0 <= shard < self.num_shards:
            raise ValueError(f"shard is {shard!r}: expected a number from 0 to {self.num_shards - 1}")
        return [shard]

    def check_restorable(self, snapshot: Snapshot) -> None:
        """ValueError, with the reason, for a snapshot that `restore` would refuse whatever is free."""
        self.shards[0].check_restorable(snapshot)

    release_request = _of_shard(KVCacheManager.release_request)
    rollback = _of_shard(KVCacheManager.rollback)
    snapshot = _of_shard(KVCacheManager.snapshot, "it can be restored on any shard")
    preempt = _of_shard(KVCacheManager.preempt, "it can be restored on any shard")
    keep_prefix = _of_shard(KVCacheManager.keep_prefix, "prompts on the same shard find what is cached")
    advance = _of_shard(KVCacheManager.advance)
    length = _of_shard(KVCacheManager.length)
    blocks = _of_shard(KVCacheManager.blocks, "blocks are numbered as on the shard")

    def fork(self, slot: int) -> Slot:
        """As `KVCacheManager.fork`; the new request is on the same shard."""
        return self._place([self.shard_of(slot)], lambda shard: shard.fork(self._own_slot(slot)))

    # Steps.

    def plan_step(
        self,
        request_slots: Any,
        positions: Any,
        *,
        lookahead: int = 0,
        limits: Any = None,
        num_segments: int | None = None,
        width: int | None = None,
        max_blocks: int | None = None,
    ) -> StepPlan:
        """Plans one step of all shards, and gives out the blocks it needs, all of them or none on any shard.

        Args:
          request_slots, positions: (shards * T,) integers: T tokens for each shard of this process, one shard after the
            other, in any order within a shard, slot -1 for padding. A shard without requests gets padding alone.
          lookahead, limits, num_segments, width, max_blocks: as for `KVCacheManager.plan_step`; sizes are those of a
            shard.

        Returns:
          The shards' plans with their arrays one after the other: split over "data", each device gets its own. Slots,
          tokens and blocks in them are numbered as on their shard.

        Raises:
          ValueError, RuntimeError: as `KVCacheManager.plan_step`, and ValueError for a token that is not in its shard's
            part; then nothing changed.
        """
        handles = request_slots if isinstance(request_slots, Sequence) else ()
        for slot in handles:
            if isinstance(slot, Slot):
                self.length(slot)  # an error where its request has ended
        slots, places = np.asarray(request_slots), np.asarray(positions)
        if not slots.size:  # of a list without elements numpy makes floats
            slots, places = slots.astype(np.int32), places.astype(np.int32)
        if slots.ndim != 1 or slots.shape != places.shape or slots.size % self.num_shards:
            raise ValueError(
                f"request_slots has shape {slots.shape} and positions {places.shape}: expected both (T,), with as many "
                f"tokens for each of {self.num_shards} shards"
            )
        own = self._own_slots(slots)
        parts = [np.split(x, self.num_shards) for x in (own, places)]
        ends = [None] * self.num_shards if limits is None else np.array_split(np.asarray(limits), self.num_shards)
        if width is None or num_segments is None:
            counts = [np.unique(part[part >= 0], return_counts=True)[1] for part in parts[0]]
            width = max((n for each in counts for n in each.tolist()), default=1) if width is None else width
            num_segments = max(map(len, counts)) if num_segments is None else num_segments
        sizes = [StepSizes(lookahead, limit, num_segments, width, max_blocks) for limit in ends]
        calls = list(zip(self.shards, *parts, sizes, strict=True))
        # A shard that refuses is found before any has changed.
        for i, (shard, *call) in enumerate(calls if self.num_shards > 1 else ()):
            self._on(i, functools.partial(shard._require_step, *call))
        plans = [self._on(i, functools.partial(shard._plan_step, *call)) for i, (shard, *call) in enumerate(calls)]
        plan = jax.tree.map(lambda *arrays: np.concatenate(arrays), *plans)
        object.__setattr__(plan, "parts", plans)  # outstanding as long as the whole is
        return plan

    def _own_slots(self, slots: np.ndarray) -> np.ndarray:
        """The slots of a step as their shards number them; ValueError for one in another shard's part."""
        if not np.issubdtype(slots.dtype, np.integer):
            raise ValueError(f"request_slots is {slots.dtype}: expected integers")
        expected = np.repeat(np.arange(self.num_shards), slots.size // self.num_shards)
        wrong = (slots != -1) & (slots // self.slots_per_shard != expected)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"token {at} is of slot {slots[at]}: expected one of shard {expected[at]}, whose slots are "
                f"{expected[at] * self.slots_per_shard} to {(expected[at] + 1) * self.slots_per_shard - 1}"
            )
        return np.where(slots == -1, -1, slots % self.slots_per_shard)
