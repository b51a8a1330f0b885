"""DeepSeek-V4's KV cache for JAX, and enough of the model around it that a checkpoint decodes."""

from .cache.manager import KVCacheManager
from .cache.prefix import PrefixPolicy
from .cache.snapshot import Snapshot
from .cache.snapshot_file import load_snapshot, save_snapshot
from .decode import generate, stream
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
