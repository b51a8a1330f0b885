"""What a model's weights take, where code written for earlier versions finds it."""

from .files.checkpoint import result_bytes

__all__ = ["result_bytes"]
