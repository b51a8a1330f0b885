"""`CompressorWeights`, where code written for earlier versions finds it."""

from .write.compress import CompressorWeights

__all__ = ["CompressorWeights"]
