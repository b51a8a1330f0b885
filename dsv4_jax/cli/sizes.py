"""Numbers of bytes as people write them."""

import re
from fractions import Fraction

from .errors import InputError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}iB"] = 1024**_power
_UNITS["kB"] = 1000
_MOST = 2**63 - 1


def parse_bytes(text: str, option: str) -> int:
    """Bytes from "80GiB" (1024 cubed each), "80GB" (1000 cubed each), "1.5TiB" or "85899345920".

    option: the name of what is read, for the sentence of the InputError.
    """
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{option} {text[:40]!r}: expected a number of bytes such as 80GiB, 80GB or 85899345920")
    count = int(Fraction(match[1]) * _UNITS[match[2]])
    if count > _MOST:
        raise InputError(f"{option} {text[:40]!r}: expected less than 8192PiB")
    return count


def show_bytes(count: float) -> str:
    """Bytes in the largest of B, KiB, MiB, GiB, TiB that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
