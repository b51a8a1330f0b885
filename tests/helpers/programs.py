"""The command line as a program of its own, for what a test cannot see in its own process."""

import os
import pathlib
import subprocess
import sys

import dsv4_jax

# Where a shell started the tests in the background they ignore SIGINT, and so would the program.
_RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{first}
from dsv4_jax.cli import main
main(sys.argv[1:])
"""


def start_command_line(*arguments: object, first: str = "", **environment: str) -> subprocess.Popen:
    """`dsv4-jax` with these arguments, after the Python code `first`, its stdout and stderr as text in pipes."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(dsv4_jax.__file__).parents[1]), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", _RUN.format(first=first), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
