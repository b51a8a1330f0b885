"""Prefill and the jit-compiled decode loop."""

from .generate import Chunk, generate, make_manager, stream
from .loop import DECODE_STEPS, PREFILL_CHUNK, DecodeLoop
from .request import Event, Stats
from .sampling import LogitsHook, LogProbs
from .snapshot import RequestSnapshot
from .steps import decode_steps, prefill_step

__all__ = [
    "DECODE_STEPS",
    "PREFILL_CHUNK",
    "Chunk",
    "DecodeLoop",
    "Event",
    "LogProbs",
    "LogitsHook",
    "RequestSnapshot",
    "Stats",
    "decode_steps",
    "generate",
    "make_manager",
    "prefill_step",
    "stream",
]
