"""What a checkpoint's generation_config.json asks for, and what flags make of it."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ..files.untrusted_json import read_json_object, shorten
from .errors import InputError

MAX_BYTES = 1 << 20


def sampling_options(
    checkpoint: pathlib.Path,
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> dict[str, Any]:
    """temperature, top_k, top_p and min_p of `DecodeLoop.submit`.

    Flags that were given (not None) win, then what generation_config.json in the folder says, then greedy and no limit.
    As in transformers, its temperature and limits hold only where `do_sample` is true: without it the file is greedy.
    """
    flags = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    written = _read(checkpoint)
    if written.get("do_sample") is True:
        options["temperature"] = 1.0
        for name in options:
            value = written.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise InputError(
                    f"{checkpoint / 'generation_config.json'}: {name} is {shorten(value)}: expected a number"
                )
            options[name] = value
    return options | {name: value for name, value in flags.items() if value is not None}


def end_tokens(checkpoint: pathlib.Path, configured: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json where it names any, else those of config.json."""
    value = _read(checkpoint).get("eos_token_id")
    if value is None:
        return tuple(configured)
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(
                f"{checkpoint / 'generation_config.json'}: eos_token_id is {shorten(value)}: expected token ids from 0 "
                f"to {vocab_size - 1}"
            )
    return tuple(tokens)


def _read(checkpoint: pathlib.Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    return dict(read_json_object(path, max_bytes=MAX_BYTES)) if path.is_file() else {}
