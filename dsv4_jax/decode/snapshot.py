"""A request outside its loop."""

from dataclasses import dataclass

from ..cache.transfer.snapshot import Snapshot
from .request import Request


@dataclass(frozen=True, eq=False)
class SampleSnapshot:
    """One sample: its tokens, and what the cache held of them."""

    index: int
    ids: tuple[int, ...]  # prompt included
    computed: int  # the first tokens of ids that `cache` holds
    to_fork: int
    read_to: int
    cache: Snapshot | None  # None: its tokens are read again


@dataclass(frozen=True, eq=False)
class RequestSnapshot:
    """A request as `DecodeLoop.snapshot` takes it out and `DecodeLoop.adopt` takes it in."""

    request: Request
    samples: tuple[SampleSnapshot, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the samples' parts of the cache."""
        return sum(s.cache.nbytes for s in self.samples if s.cache is not None)
