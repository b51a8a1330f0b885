"""Sessions on the shards of a mesh: a slot's shard has its own blocks, and tokens come in their shard's part."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from life.fill import Fill
from life.session import KINDS, Session, fill_with_nan
from life.worlds import Views, is_news, on_host, unlike_before

from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.sharded_manager import ShardedKVCacheManager
from dsv4_jax.cache.sharding import cache_specs, check_mesh


class ShardedSession(Session):
    """A session whose slots and blocks lie on the shards of the world's mesh, as many on each."""

    world: "ShardedViews"

    def new_manager(self, **options: Any) -> ShardedKVCacheManager:
        self.shards = self.world.mesh.devices.size
        self.own = self.slots // self.shards  # slots of a shard
        make = partial(self.world.fill.new_manager, slots=self.own, blocks=self.num_blocks // self.shards, **options)
        return ShardedKVCacheManager.over(self.world.mesh, make)

    def _on(self, shard: int) -> list[int]:
        return [slot for slot in self.lengths if slot // self.own == shard]

    def _free_on(self, shard: int, kind: str) -> int:
        taken = {block for slot in self._on(shard) for block in self.manager.blocks(slot)[kind]}
        return self.num_blocks // self.shards - len(taken)

    def _fits(self, length: int) -> bool:
        return any(
            len(self._on(shard)) < self.own
            and all(n <= self._free_on(shard, kind) for kind, n in self._blocks_for(length).items())
            for shard in range(self.shards)
        )

    def _fits_beside(self, slot: int) -> bool:
        shard = slot // self.own
        room = all(len(ids) <= self._free_on(shard, kind) for kind, ids in self.manager.blocks(slot).items())
        return len(self._on(shard)) < self.own and room

    def _room(self, ends: dict[int, int]) -> bool:
        needed = {(slot // self.own, kind): 0 for slot in ends for kind in KINDS}
        for slot, end in ends.items():
            for kind, blocks in self._blocks_for(end).items():
                needed[slot // self.own, kind] += max(blocks - len(self.manager.blocks(slot)[kind]), 0)
        return all(n <= self._free_on(*where) for where, n in needed.items())

    def _tokens(self, new: dict[int, int], total: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        part = super()._tokens
        parts = [
            part({s: n for s, n in new.items() if s // self.own == shard}, total // self.shards, seed)
            for shard in range(self.shards)
        ]
        slots, positions = zip(*parts, strict=True)
        return np.concatenate(slots), np.concatenate(positions)

    def poison(self) -> None:
        for i, shard in enumerate(self.manager.shards):
            free = {kind: np.zeros(self.num_blocks // self.shards, bool) for kind in KINDS}
            for kind in KINDS:
                free[kind][shard._books.ledger.free_blocks(kind)] = True
            dead = np.array([i * self.own + s not in self.lengths for s in range(self.own)])
            shard.cache = fill_with_nan(shard.cache, free, dead)
        self._done()


class ShardedViews(Views):
    """What every token sees, computed on all devices of a mesh at once."""

    session_type = ShardedSession
    blocks = 8  # four a shard: each of its two requests has three at most

    def __init__(self, fill: Fill, mesh: jax.sharding.Mesh):
        super().__init__(fill)
        self.mesh = check_mesh(mesh)

    def step(self, session: Session, plan: StepPlan) -> None:
        whole = self._whole(session, plan)
        tokens = np.where(whole.slots >= 0, session.texts[whole.slots, whole.positions], 0)
        session.manager.cache, seen = self._step(session.manager.cache, plan, tokens)
        self.fill.compare(seen, session.expected, whole, unlike_before(session, whole))

    def check(self, session: Session) -> None:
        slots, positions = np.full(session.slots, -1, np.int32), np.zeros(session.slots, np.int32)
        for slot, n in session.lengths.items():
            if n > session.complete.get(slot, 0) and n != session.restored.get(slot):
                slots[slot], positions[slot] = slot % session.own, n - 1
        if session.expected is not None and is_news(session, slots, positions):
            plan = StepPlan(slots, positions)
            seen = self._look(session.manager.cache, plan)
            self.fill.compare(seen, session.expected, self._whole(session, plan), np.zeros(len(slots), bool))

    def _whole(self, session: Session, plan: StepPlan) -> StepPlan:
        """The plan on the host, with the slots and segments of all shards in one numbering."""
        plan = on_host(plan)
        shard = np.repeat(np.arange(session.shards), len(plan.slots) // session.shards)
        grouped = plan.grouped
        if grouped is not None:
            grouped = grouped._replace(rows=grouped.rows + shard * (grouped.tokens.size // session.shards))
        return StepPlan(np.where(plan.slots >= 0, plan.slots + shard * session.own, -1), plan.positions, grouped)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, cache: Any, plan: StepPlan, tokens: jax.Array) -> Any:
        specs = cache_specs(cache)
        inside = jax.shard_map(
            self.fill.step, mesh=self.mesh, in_specs=(specs, P("data"), P("data")), out_specs=(specs, P("data")),
            check_vma=False,
        )  # fmt: skip
        return inside(cache, plan, jnp.asarray(tokens))

    @partial(jax.jit, static_argnums=0)
    def _look(self, cache: Any, plan: StepPlan) -> Any:
        inside = jax.shard_map(
            self.fill.look, mesh=self.mesh, in_specs=(cache_specs(cache), P("data")), out_specs=P("data"),
            check_vma=False,
        )  # fmt: skip
        return inside(cache, plan)
