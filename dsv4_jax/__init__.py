"""DeepSeek-V4's KV cache for JAX, and enough of the model around it that a checkpoint decodes."""

from .cache.manager import KVCacheManager
from .decode import generate, stream
from .model.config import DSV4Config
from .model.layer_schedule import build_schedule
from .model.pretrained import from_pretrained

__all__ = ["DSV4Config", "KVCacheManager", "build_schedule", "from_pretrained", "generate", "stream"]

__version__ = "0.1.0"
