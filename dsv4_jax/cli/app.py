"""The application: its commands, and what all of them share."""

from collections.abc import Sequence
from typing import Annotated

import typer

from .chat import chat
from .errors import run_and_exit
from .generate import generate
from .inspect import inspect
from .plan import plan
from .quantize import quantize

app = typer.Typer(
    help="DeepSeek-V4's KV cache for JAX, and a decode loop over it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command()(plan)
app.command()(quantize)


def _version(wanted: bool) -> None:
    if wanted:
        from dsv4_jax import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exit status: 0, 1 for a failure, 2 for bad usage or input, 130 after Ctrl-C."""
    run_and_exit(lambda: app(arguments, prog_name="dsv4-jax", standalone_mode=False))
