"""Numbers that callers give: checked where they come in, because what a wrong one breaks shows much later."""

from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python's or numpy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def count(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """`value` as an int; ValueError with its name unless it is an integer (no bool) from `least` to `most`."""
    if is_integer(value) and value >= least and (most is None or value <= most):
        return int(value)
    span = f", {least} or more" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name} is {value!r}: expected an integer{span}")
