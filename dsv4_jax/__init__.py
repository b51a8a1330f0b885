"""DeepSeek-V4's KV cache for JAX, and enough of the model around it that a checkpoint decodes."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first asked for: JAX and Flax take seconds, and `dsv4-jax --help` needs neither.
if TYPE_CHECKING:
    # What the cache needs to know of a model.
    from .cache.cost import cache_cost as cache_cost
    from .cache.geometry import AttentionType as AttentionType
    from .cache.geometry import CacheGeometry as CacheGeometry

    # A layer of a step: what it writes and reads.
    from .cache.handle import LayerCacheHandle as LayerCacheHandle

    # The cache, and the host's side of it.
    from .cache.host.prefix import PrefixPolicy as PrefixPolicy
    from .cache.host.slot import Slot as Slot
    from .cache.kv_cache import KVCache as KVCache
    from .cache.manager import KVCacheManager as KVCacheManager
    from .cache.occupancy import occupancy as occupancy
    from .cache.plan import StepPlan as StepPlan
    from .cache.schema import build_schema as build_schema
    from .cache.schema import compute_block_budget as compute_block_budget
    from .cache.sharded_manager import ShardedKVCacheManager as ShardedKVCacheManager

    # A request outside the cache.
    from .cache.transfer.snapshot import Snapshot as Snapshot
    from .cache.transfer.snapshot_file import load_snapshot as load_snapshot
    from .cache.transfer.snapshot_file import save_snapshot as save_snapshot
    from .cache.views import ClassicalView as ClassicalView
    from .cache.views import IndexerView as IndexerView
    from .cache.views import SWAView as SWAView

    # Text from a checkpoint.
    from .cli.options import packaged_checkpoint as packaged_checkpoint
    from .decode.generate import generate as generate
    from .decode.generate import make_manager as make_manager
    from .decode.generate import stream as stream
    from .decode.loop import DecodeLoop as DecodeLoop
    from .model.config import DSV4Config as DSV4Config
    from .model.layer_schedule import build_schedule as build_schedule
    from .model.pretrained import from_pretrained as from_pretrained
    from .model.random_weights import random_model as random_model
    from .model.sharding import shard_model as shard_model
    from .ops.dispatch import native_calls as native_calls
    from .ops.formats.fp4 import hadamard as hadamard
    from .ops.read.attend import RawQuery as RawQuery
    from .ops.write.append_swa_fused import RawWindow as RawWindow
    from .ops.write.compress import CompressorWeights as CompressorWeights
    from .ops.write.compress import Projections as Projections

_MODULES = {
    # What the cache needs to know of a model.
    "CacheGeometry": ".cache.geometry",
    "AttentionType": ".cache.geometry",
    "DSV4Config": ".model.config",
    "build_schedule": ".model.layer_schedule",
    # The cache, and the host's side of it.
    "KVCache": ".cache.kv_cache",
    "KVCacheManager": ".cache.manager",
    "ShardedKVCacheManager": ".cache.sharded_manager",
    "PrefixPolicy": ".cache.host.prefix",
    "Slot": ".cache.host.slot",
    "StepPlan": ".cache.plan",
    # A layer of a step: what it writes and reads.
    "LayerCacheHandle": ".cache.handle",
    "CompressorWeights": ".ops.write.compress",
    "Projections": ".ops.write.compress",
    "RawWindow": ".ops.write.append_swa_fused",
    "RawQuery": ".ops.read.attend",
    "SWAView": ".cache.views",
    "ClassicalView": ".cache.views",
    "IndexerView": ".cache.views",
    "hadamard": ".ops.formats.fp4",
    # A step in a file.
    "native_calls": ".ops.dispatch",
    # A request outside the cache.
    "Snapshot": ".cache.transfer.snapshot",
    "save_snapshot": ".cache.transfer.snapshot_file",
    "load_snapshot": ".cache.transfer.snapshot_file",
    # What it costs, what it holds.
    "build_schema": ".cache.schema",
    "cache_cost": ".cache.cost",
    "compute_block_budget": ".cache.schema",
    "occupancy": ".cache.occupancy",
    # Text from a checkpoint.
    "packaged_checkpoint": ".cli.options",
    "from_pretrained": ".model.pretrained",
    "random_model": ".model.random_weights",
    "shard_model": ".model.sharding",
    "generate": ".decode.generate",
    "stream": ".decode.generate",
    "DecodeLoop": ".decode.loop",
    "make_manager": ".decode.generate",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
