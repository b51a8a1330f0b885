"""What goes wrong, in one sentence, and the exit status."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable

import typer

from ..files.system_errors import in_words

INTERRUPTED = 130
WORKER = "dsv4-jax-worker"
"""Name of a thread that works for a command: see `terminal.in_background`."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is one sentence for the user."""


def one_line(error: BaseException | str) -> str:
    """The message on one line of at most 400 characters, none of which moves a terminal's cursor."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 400 else text[:399] + "…"


def describe(error: Exception) -> tuple[str, int]:
    """One sentence and the exit status."""
    if hasattr(error, "format_message"):  # the parser's own errors
        path = getattr(getattr(error, "ctx", None), "command_path", "dsv4-jax")
        return f"{one_line(error.format_message()).rstrip('.')} (see {path} --help)", getattr(error, "exit_code", 2)
    text = one_line(in_words(error) if isinstance(error, OSError) else error)
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return text, 2
    if isinstance(error, MemoryError):
        return "out of memory: fewer or shorter prompts need less", 1
    if isinstance(error, (RuntimeError, OSError)):
        return text, 1
    return f"{type(error).__name__}: {text}", 1


def run_and_exit(command: Callable[[], object]) -> None:
    """Runs a command and ends the program: status 0, 1 for a failure, 2 for bad usage or input, 130 after Ctrl-C."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    try:
        status = command()
        sys.stdout.flush()
        status = status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # Whoever read the text has gone (typer turns that into SystemExit): Python must not complain at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except Exception as error:
        message, status = describe(error)
        print(f"dsv4-jax: {message}", file=sys.stderr)
    if any(thread.name == WORKER for thread in threading.enumerate()):
        # The run was left in the middle: a thread inside JAX would abort an interpreter that shuts down around it.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
