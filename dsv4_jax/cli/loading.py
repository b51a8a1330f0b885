"""Loading a model, with a progress bar."""

import pathlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import dsv4_jax

from .errors import InputError
from .terminal import in_background, make_bytes_progress


def load_model(folder: pathlib.Path, console: Console, dtype: str = "float32") -> Any:
    """The model of the checkpoint in `folder`; InputError where that is a file."""
    if folder.is_file():
        raise InputError(f"{folder} is a file: expected the folder of a checkpoint, with its config.json")

    def load() -> Iterator[Any]:
        yield dsv4_jax.from_pretrained(
            folder, dtype=dtype, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )

    with make_bytes_progress(console) as bar:
        task = bar.add_task("loading", total=None)
        (model,) = in_background(load)
    return model
