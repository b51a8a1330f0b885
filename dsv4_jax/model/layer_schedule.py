"""Which attention, feed-forward and router each layer has."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..cache.geometry import AttentionType
from .field_checks import KNOWN_RATIOS

__all__ = ["AttentionType", "FFNType", "LayerSpec", "RouterMode", "build_schedule"]


class FFNType(enum.Enum):
    """The feed-forward part of a layer. DeepSeek-V4 has only mixtures of experts."""

    MOE = "moe"


class RouterMode(enum.Enum):
    """How a layer chooses its experts (report, section 2.1)."""

    HASH = "hash"  # by a table from the token id
    DENSE = "dense"  # by learned scores


_OF_NAME = dict(zip(KNOWN_RATIOS.values(), AttentionType, strict=True))  # Hugging Face's `layer_types`
_RELEASED_RATIO = {_OF_NAME[name]: ratio for ratio, name in KNOWN_RATIOS.items()}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What layer `layer_idx` (counted from 0) is made of.

    compress_ratio: tokens per compressed entry, 0 for no entries; by default that of the released models.
    """

    layer_idx: int
    attn: AttentionType
    ffn: FFNType
    router_mode: RouterMode
    compress_ratio: int = -1

    def __post_init__(self) -> None:
        if self.compress_ratio < 0:
            object.__setattr__(self, "compress_ratio", _RELEASED_RATIO[self.attn])


class LayerRatios(Protocol):
    """What a schedule follows from; `DSV4Config` is one."""

    @property
    def compress_ratios(self) -> Sequence[int]:
        """Tokens per compressed entry, of each layer."""

    @property
    def attention_of_ratio(self) -> Mapping[int, str]:
        """The kind of attention that a ratio stands for."""

    @property
    def num_hash_layers(self) -> int:
        """First layers that route by token id."""


def build_schedule(config: LayerRatios) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per layer, in order; the first `num_hash_layers` route by token id."""
    return tuple(
        LayerSpec(
            layer_idx=layer,
            attn=_OF_NAME[config.attention_of_ratio[ratio]],
            ffn=FFNType.MOE,
            router_mode=RouterMode.HASH if layer < config.num_hash_layers else RouterMode.DENSE,
            compress_ratio=ratio,
        )
        for layer, ratio in enumerate(config.compress_ratios)
    )
