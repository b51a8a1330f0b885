"""Checks of single values that come from files nobody vouches for.

A check takes the name to use in errors and the value; it returns the value in its normal form
(int, float, tuple, …) or raises ValueError with the name, what it got and what it expected.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

from dsv4_jax.files.untrusted_json import shorten

#: Tokens per compressed entry in the released models -> the attention of such a layer, in Hugging Face's words.
KNOWN_RATIOS = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
MAX_LAYERS = 4096
MAX_RATIO = 1 << 16  # tokens per entry, and per block of entries
MAX_VOCAB = 1 << 24
MAX_POSITION = (1 << 31) - 1  # positions are int32


def integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} is {shorten(value)}: expected an integer")
        if not low <= int(value) <= high:
            raise ValueError(f"{name} is {shorten(value)}: expected an integer from {low} to {high}")
        return int(value)

    return check


def real(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} is {shorten(value)}: expected a number")
        # Compared before float(), which overflows for an integer of 400 digits. NaN fails too.
        number: Any = value
        if not low <= number <= high:
            raise ValueError(f"{name} is {shorten(value)}: expected a number from {low:g} to {high:g}")
        return float(value)

    return check


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shorten(value)}: expected true or false")
    return value


def only(*allowed: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        # Types are compared too, because 1 == True == 1.0.
        for choice in allowed:
            if type(value) is type(choice) and value == choice:
                return choice
        choices = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} is {shorten(value)}: expected {choices}")

    return check


def sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {shorten(value)}: expected a list")
    if len(value) > 2 * MAX_LAYERS:
        raise ValueError(f"{name} has {len(value)} entries: expected one per layer, at most {2 * MAX_LAYERS}")
    return tuple(value)


def ratios(name: str, value: Any) -> tuple[int, ...]:
    result = sequence(name, value)
    for layer, ratio in enumerate(result):
        is_integer = isinstance(ratio, numbers.Integral) and not isinstance(ratio, bool)
        if not is_integer:
            raise ValueError(f"{name}[{layer}] is {shorten(ratio)}: expected an integer, tokens per compressed entry")
    return tuple(int(ratio) for ratio in result)


def token_id(name: str, value: Any) -> int | None:
    return None if value is None else integer(0, MAX_VOCAB - 1)(name, value)


def token_ids(name: str, value: Any) -> int | tuple[int, ...] | None:
    if isinstance(value, (list, tuple)):
        if not 1 <= len(value) <= 1024:
            raise ValueError(f"{name} has {len(value)} entries: expected 1 to 1024 token ids")
        return tuple(integer(0, MAX_VOCAB - 1)(f"{name}[{i}]", v) for i, v in enumerate(value))
    return token_id(name, value)
