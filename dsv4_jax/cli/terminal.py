"""Output: text on stdout; log messages, progress and summaries on stderr."""

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from .errors import WORKER


class ConsoleHandler(logging.Handler):
    """Log messages above a progress bar, on lines that are not cut."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message."""
        self._console.print(self.format(record), markup=False, soft_wrap=True)


class TextOutput:
    """Text on stdout as it comes."""

    def __init__(self):
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        # A model may write what moves a terminal's cursor or changes its title: there, show such characters instead.
        controls = {c: 0xFFFD for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
        self._shown = controls if sys.stdout.isatty() else {}
        self.at_line_start = True

    def write(self, text: str) -> None:
        """Writes and flushes."""
        if text:
            sys.stdout.write(text.translate(self._shown))
            sys.stdout.flush()
            self.at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Ends a line that has begun."""
        if not self.at_line_start:
            self.write("\n")


def make_console(quiet: bool) -> Console:
    """The console of stderr; log messages go there too."""
    console = Console(stderr=True, quiet=quiet, highlight=False)
    logging.basicConfig(format="%(message)s", handlers=[ConsoleHandler(console)])
    return console


def make_progress(console: Console, unit: str) -> Progress:
    """A progress bar that counts in `unit`, on a terminal only; it goes away when it is done."""
    return _progress(
        console, SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
        TextColumn(f"{{task.completed:.0f}} {unit}"), TimeElapsedColumn(),
    )  # fmt: skip


def make_bytes_progress(console: Console) -> Progress:
    """A progress bar of bytes and their rate, on a terminal only; it goes away when it is done."""
    return _progress(
        console, SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeElapsedColumn(),
    )  # fmt: skip


def status(console: Console, what: str) -> Progress:
    """A spinner beside `what` while something of unknown length runs, on a terminal only; stop it before any output."""
    progress = _progress(console, SpinnerColumn(), TextColumn("{task.description}"))
    progress.add_task(what, total=None)
    return progress


def _progress(console: Console, *columns: ProgressColumn) -> Progress:
    # stdout stays what it is: it may be a file while stderr is a terminal.
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal)


def in_background(items: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The items of an iterator that another thread walks, so that Ctrl-C is heard in the middle of a compilation.

    And heard at all: where JAX works in the main thread, one that comes inside its garbage collection hook is lost.
    """
    box: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            for item in items():
                box.put((item, None))
            box.put(None)
        except BaseException as error:  # handed over, whatever it is
            box.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name=WORKER)
    thread.start()
    while (got := box.get()) is not None:
        item, error = got
        if error is not None:
            thread.join()
            raise error
        yield item
    thread.join()


def show_seconds(value: float) -> str:
    """Seconds with as many digits as say something."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
