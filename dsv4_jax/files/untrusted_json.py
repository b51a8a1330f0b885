"""JSON from files that are not trusted: bounded in size, depth and number of containers."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

MAX_DEPTH = 32
MAX_CONTAINERS = 2_000_000

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json_object(raw: bytes, what: str, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parses `raw` as one JSON object.

    Args:
      raw: the bytes, UTF-8.
      what: the file (and part of it) these bytes come from; every error starts with it.
      max_depth: the deepest nesting allowed.

    Raises:
      ValueError: not UTF-8, not JSON, not an object, a key given twice, nested too deeply, or
        too many containers. Depth and number of containers are counted before parsing, so that
        a small file cannot make the parser take the stack or gigabytes.
    """
    brackets = _STRING.sub(b"", _ESCAPE.sub(b"", raw)).translate(None, _NOT_BRACKETS)
    containers = brackets.count(b"[") + brackets.count(b"{")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"{what}: holds {containers} lists and objects, at most {MAX_CONTAINERS} are read")
    depth = max(accumulate(1 if b in b"[{" else -1 for b in brackets), default=0)
    if depth > max_depth:
        raise ValueError(f"{what}: nested {depth} deep, at most {max_depth} is read")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {shorten(twice)} is given twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    # ValueError covers bad UTF-8, bad JSON, duplicate keys and integers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {shorten(value)}")
    return value


def read_json_object(path: str | os.PathLike[str], *, max_bytes: int) -> dict[str, Any]:
    """Reads the JSON object in the file `path`; refuses a file of more than `max_bytes` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a regular file, too large, or refused by `parse_json_object`.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)}: expected a JSON file, got something else")
    with open(path, "rb") as file:
        # read(n) takes n bytes of memory at once, however short the file is.
        raw = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"{os.fspath(path)}: larger than {max_bytes} bytes, too large for a file of its kind")
    return parse_json_object(raw, os.fspath(path))


def shorten(value: object, limit: int = 60) -> str:
    """`repr(value)`, cut so that an error message stays one readable sentence."""
    # A slice first: the repr of a huge integer or list would itself be the attack.
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > limit:
        kind = "" if isinstance(value, (str, bytes)) else f" ({len(value)} entries)"
        return repr(value[: limit // 2])[: limit + 10] + "…" + kind
    if isinstance(value, Mapping):
        return f"an object with {len(value)} keys"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit + 10 else text[:limit] + "…"
