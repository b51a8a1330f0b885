"""The command line: `dsv4-jax`. One command a file; `app.py` puts them together."""

from .app import app, main
from .errors import InputError
from .options import CacheDtype, Dtype, IndexerDtype, packaged_checkpoint
from .outcome import CompileClock
from .prompts import make_codec
from .terminal import TextOutput

__all__ = [
    "CacheDtype",
    "CompileClock",
    "Dtype",
    "IndexerDtype",
    "InputError",
    "TextOutput",
    "app",
    "main",
    "make_codec",
    "packaged_checkpoint",
]
