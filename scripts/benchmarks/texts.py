"""Texts to measure on: Python source from the standard library of the running interpreter."""

import pathlib
import sysconfig

MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools", "glob", "gzip",
    "heapq", "imaplib", "inspect", "locale", "mailbox", "optparse", "pdb", "pickle", "shelve", "tarfile",
)  # fmt: skip


def python_source(count: int, shortest: int, longest: int) -> list[bytes]:
    """`count` pieces from the middle of different modules, with lengths spread evenly from `shortest` to `longest`."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for name in MODULES:
        path = library / f"{name}.py"
        data = path.read_bytes() if path.exists() else b""
        if len(data) < 2 * longest:
            continue
        length = shortest + (longest - shortest) * len(pieces) // max(count - 1, 1)
        # A piece begins at a line.
        start = data.index(b"\n", len(data) // 3) + 1
        pieces.append(data[start : start + length])
        if len(pieces) == count:
            return pieces
    raise SystemExit(f"only {len(pieces)} long enough modules in {library}: expected {count}, ask for fewer texts")
