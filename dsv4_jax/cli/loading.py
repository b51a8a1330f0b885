"""Loading a model, with a progress bar."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import dsv4_jax

from .errors import InputError
from .terminal import in_background, make_bytes_progress


class _ToConsole(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage())


@contextlib.contextmanager
def _said_by(logger: logging.Logger, console: Console) -> Iterator[None]:
    """Shows what is logged meanwhile, such as how many tensors of draft layers are skipped."""
    handler, level = _ToConsole(console), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def load_model(folder: pathlib.Path, console: Console, dtype: str = "float32") -> Any:
    """The model of the checkpoint in `folder`; InputError where that is a file."""
    if folder.is_file():
        raise InputError(f"{folder} is a file: expected the folder of a checkpoint, with its config.json")

    def load() -> Iterator[Any]:
        yield dsv4_jax.from_pretrained(
            folder, dtype=dtype, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )

    with _said_by(logging.getLogger("dsv4_jax.model"), console), make_bytes_progress(console) as bar:
        task = bar.add_task("loading", total=None)
        (model,) = in_background(load)
    return model
