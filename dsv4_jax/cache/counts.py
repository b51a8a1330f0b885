"""Numbers that callers give: checked where they come in, because what a wrong one breaks shows much later."""

import numbers
from typing import Any


def count(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """`value` as an int; ValueError with its name unless it is an integer (no bool) from `least` to `most`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least and (most is None or number <= most):
            return number
    span = f", {least} or more" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name} is {value!r}: expected an integer{span}")
