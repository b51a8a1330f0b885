"""Output files: whole, or not there at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


class CannotWriteError(ValueError):
    """No file can be written where one was asked for."""


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """The path of a temporary file beside `path` to write to; it takes the name `path` when the block ends well.

    After an error or Ctrl-C the temporary file is gone and `path` is what it was. Raises CannotWriteError where no file
    can be made.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise CannotWriteError(f"{path} cannot be written: it is {'a folder' if path.is_dir() else 'no regular file'}")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from None
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
