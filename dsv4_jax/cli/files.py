"""Output files of the commands."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from ..files import written_whole as files
from .errors import InputError


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """As `dsv4_jax.files.written_whole`, with an InputError where no file can be made."""
    try:
        with files.written_whole(path) as temporary:
            yield temporary
    except files.CannotWriteError as error:
        raise InputError(str(error)) from None
