"""DeepSeek-V4's KV cache for JAX, and enough of the model around it that a checkpoint decodes."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.host.prefix import PrefixPolicy
    from .cache.manager import KVCacheManager
    from .cache.transfer.snapshot import Snapshot
    from .cache.transfer.snapshot_file import load_snapshot, save_snapshot
    from .decode.generate import generate, stream
    from .model.config import DSV4Config
    from .model.layer_schedule import build_schedule
    from .model.pretrained import from_pretrained

__all__ = [
    "DSV4Config",
    "KVCacheManager",
    "PrefixPolicy",
    "Snapshot",
    "build_schedule",
    "from_pretrained",
    "generate",
    "load_snapshot",
    "save_snapshot",
    "stream",
]

__version__ = "0.1.0"

# Imported when first asked for: JAX and Flax take seconds, and `dsv4-jax --help` needs neither.
_MODULES = {
    "DSV4Config": ".model.config",
    "KVCacheManager": ".cache.manager",
    "PrefixPolicy": ".cache.host.prefix",
    "Snapshot": ".cache.transfer.snapshot",
    "build_schedule": ".model.layer_schedule",
    "from_pretrained": ".model.pretrained",
    "generate": ".decode.generate",
    "load_snapshot": ".cache.transfer.snapshot_file",
    "save_snapshot": ".cache.transfer.snapshot_file",
    "stream": ".decode.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
