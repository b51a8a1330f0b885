"""What a cache needs to know of a model, and nothing else."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .counts import count


class AttentionType(enum.StrEnum):
    """The attention of a layer (arXiv 2606.19348, section 2.3).

    Every type sees the sliding window; CSA and HCA layers see compressed entries besides.
    """

    SWA = "swa"
    CSA = "csa"
    HCA = "hca"


class LayerKind(NamedTuple):
    """A layer as the cache sees it."""

    layer_idx: int
    attn: AttentionType


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """The shapes that a cache follows from (arXiv 2606.19348, section 2.3). Frozen and hashable.

    Attributes:
      layers: the attention of each layer, "swa", "csa" or "hca".
      head_dim: values of a key-value vector.
      rope_dim: how many of them RoPE rotates, the last ones.
      window: tokens that a sliding window shows, the newest included.
      index_head_dim: values of an indexer key (CSA).
      csa_ratio: tokens that a CSA layer compresses into an entry.
      hca_ratio: tokens that an HCA layer compresses into an entry.

    Raises:
      ValueError: no layers, an unknown kind of layer, or a size below 1.
    """

    layers: Sequence[str]
    head_dim: int = 512
    rope_dim: int = 64
    window: int = 128
    index_head_dim: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers:
            raise ValueError(
                f"layers is {self.layers!r}: expected the kind of each layer, such as ('swa', 'csa', 'hca')"
            )
        for layer, kind in enumerate(self.layers):
            if kind not in set(AttentionType):
                raise ValueError(f"layer {layer} is {kind!r}: expected one of {', '.join(AttentionType)}")
        object.__setattr__(self, "layers", tuple(AttentionType(kind) for kind in self.layers))
        for name in ("head_dim", "window", "index_head_dim", "csa_ratio", "hca_ratio"):
            object.__setattr__(self, name, count(name, getattr(self, name), least=1))
        object.__setattr__(self, "rope_dim", count("rope_dim", self.rope_dim, least=2, most=self.head_dim))

    @property
    def sliding_window(self) -> int:
        """`window`, as model configurations call it."""
        return self.window

    @property
    def block_size(self) -> int:
        """Tokens that a paged block covers: the least common multiple of the two ratios."""
        return math.lcm(self.csa_ratio, self.hca_ratio)

    @property
    def schedule(self) -> tuple[LayerKind, ...]:
        """One `LayerKind` per layer, in order."""
        return tuple(LayerKind(layer, AttentionType(kind)) for layer, kind in enumerate(self.layers))
