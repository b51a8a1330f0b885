"""`quantise`, where code written for earlier versions finds it."""

from .files.weight_formats import quantise

__all__ = ["quantise"]
