"""A request outside the cache: what it needs to continue, in numpy arrays."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ...files.untrusted_json import shorten
from ..kv_cache import KVCache
from ..schema import CacheSchema
from .slots import read_blocks, write_blocks
from .state_rows import read_rows, row_ranges


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A request of `length` tokens: its entries, the ring rows still visible and the live part of the tails.

    Of another cache's size it knows nothing; it fits any whose model and record formats are the same.
    """

    length: int
    rollback: int  # tokens that can be forgotten after it is restored
    fingerprint: str  # of the model
    layers: tuple[str, ...]  # the kind of each layer
    schemas: dict[str, CacheSchema]  # by kind, with max_rollback 0
    arrays: dict[str, np.ndarray]  # (L, entries or rows, ...) by name, such as "csa.entries.nope", "swa.ring.rope"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in self.arrays.values())

    @property
    def state_nbytes(self) -> int:
        """Bytes of what does not grow with the length: all but entries and indexer keys."""
        return sum(x.nbytes for name, x in self.arrays.items() if name.split(".")[1] not in ("entries", "indexer"))


def take_snapshot(
    cache: KVCache, slot: int, length: int, blocks: dict[str, list[int]], *, rollback: int, fingerprint: str
) -> Snapshot:
    """The request of `slot`, which has `length` tokens in these blocks. Waits for the steps in flight."""
    arrays: dict[str, np.ndarray] = {}
    for kind, pool in cache.paged.items():
        used = blocks[kind][: pool.schema.blocks_for(length)]
        arrays |= _read_entries(kind, pool, used, length // pool.schema.compress_ratio)
    arrays |= read_rows(cache, slot, length - rollback, length)
    return Snapshot(
        length=length,
        rollback=rollback,
        fingerprint=fingerprint,
        layers=tuple(schema.kind for schema in cache.schemas),
        schemas=_schemas(cache),
        arrays=arrays,
    )


def write_entries(cache: KVCache, snapshot: Snapshot, blocks: dict[str, list[int]]) -> Iterator[KVCache]:
    """The cache with a snapshot's entries in these blocks, after each part. Donates the pools."""
    paged = dict(cache.paged)
    for kind, ids in blocks.items():

        def in_blocks(path: tuple, x: Any, kind: str = kind, n: int = len(ids)) -> np.ndarray:
            rows = snapshot.arrays[_name(kind, path)]
            padded = np.zeros((x.shape[0], n * x.shape[2], *x.shape[3:]), x.dtype)
            padded[:, : rows.shape[1]] = rows
            return padded.reshape(x.shape[0], n, *x.shape[2:])

        if ids:
            values = jax.tree_util.tree_map_with_path(in_blocks, paged[kind])
            for pool in write_blocks(paged[kind], ids, values):
                paged[kind] = pool
                yield cache.replace_state(cache.state, paged, cache.block_table)


def require_fit(snapshot: Snapshot, cache: KVCache, fingerprint: str, max_context_len: int) -> None:
    """ValueError, with the reason, unless the snapshot's request can continue in this cache."""
    given: Any = snapshot
    if not isinstance(given, Snapshot):
        raise ValueError(f"restore got a {type(given).__name__}: expected a Snapshot")
    if snapshot.fingerprint != fingerprint:
        raise ValueError(
            f"the snapshot is of another model: its fingerprint is {shorten(snapshot.fingerprint[:12])}…, this "
            f"cache's {fingerprint[:12]!r}…"
        )
    layers = tuple(schema.kind for schema in cache.schemas)
    if snapshot.layers != layers:
        raise ValueError(
            f"the snapshot has {len(snapshot.layers)} layers of other kinds than this cache's {len(layers)}"
        )
    for kind, mine in _schemas(cache).items():
        theirs = snapshot.schemas.get(kind)
        for field in dataclasses.fields(CacheSchema):
            a, b = getattr(theirs, field.name, None), getattr(mine, field.name)
            if a != b and (field.name != "hca_tail" or kind == "hca"):  # elsewhere it says nothing
                raise ValueError(
                    f"the snapshot's {kind.upper()} layers have {field.name} {shorten(a)}, this cache's {b!r}"
                )
    if not 0 <= snapshot.rollback <= snapshot.length <= max_context_len:
        raise ValueError(
            f"the snapshot has {snapshot.length} tokens, {snapshot.rollback} of them to roll back: this cache has room "
            f"for {max_context_len} in a request (max_context_len)"
        )
    expected = _expected(cache, snapshot.length, snapshot.rollback)
    found = {name: (x.shape, x.dtype) for name, x in snapshot.arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"the snapshot's array {shorten(name)} is {found.get(name, 'missing')}: expected "
                f"{expected.get(name, 'none of that name')}"
            )


def _expected(cache: KVCache, length: int, rollback: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of a snapshot, by name."""
    expected = {}
    for kind, pool in cache.paged.items():
        for path, x in jax.tree_util.tree_leaves_with_path(pool):
            shape = (x.shape[0], length // pool.schema.compress_ratio, *x.shape[3:])
            expected[_name(kind, path)] = shape, x.dtype
    ranges = row_ranges(_schemas(cache), cache.state, length - rollback, length)
    for kind, state in cache.state.items():
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            if (name := _name(kind, path)) in ranges:
                first, end = ranges[name]
                expected[name] = (x.shape[0], end - first, *x.shape[3:]), x.dtype
    return expected


def _schemas(cache: KVCache) -> dict[str, CacheSchema]:
    return {kind: dataclasses.replace(state.schema, max_rollback=0) for kind, state in cache.state.items()}


def _name(kind: str, path: tuple) -> str:
    return ".".join([kind, *(part.name for part in path)])


def _read_entries(kind: str, pool: Any, ids: list[int], entries: int) -> dict[str, np.ndarray]:
    arrays = {}
    parts = read_blocks(pool, ids)
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(pool)):
        rows = [np.asarray(jax.tree.leaves(part)[i])[:, :n] for part, n in parts]
        rows = [r.reshape(r.shape[0], -1, *r.shape[3:]) for r in rows] or [
            np.zeros((x.shape[0], 0, *x.shape[3:]), x.dtype)
        ]
        arrays[_name(kind, path)] = np.concatenate(rows, axis=1)[:, :entries].copy()
    return arrays
