"""A short test of an installed package, with its dependencies and nothing else: smoke.py LIBRARY…

The libraries are those that the package shall bring: cpu, or cpu cuda.
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import dsv4_jax
from dsv4_jax.ops import dispatch

PROGRAM = pathlib.Path(sys.executable).with_name("dsv4-jax")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the installed program; its end in a failure is one here."""
    environment = {**os.environ, **environment}
    result = subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"smoke: {' '.join(arguments)} ended with {result.returncode}: {result.stderr}")
    return result


def expect(what: str, got: object, expected: object) -> None:
    """Says what was checked, or ends."""
    if got != expected:
        raise SystemExit(f"smoke: {what}: got {got}, expected {expected}")
    print(f"  {what}: {got!r}")


def main() -> None:
    """Libraries, version, commands, and that native code and jax.numpy write the same text."""
    here = pathlib.Path(dsv4_jax.__file__)
    if sys.prefix not in str(here):
        raise SystemExit(f"smoke: {here} is not the installed package")
    expect("version", run("--version").stdout.strip(), importlib.metadata.version("dsv4_jax"))
    expect("native libraries", sorted(dispatch.available()), sorted(sys.argv[1:]))
    report = json.loads(run("plan", "--config", "flash", "--memory", "80GiB", "--json").stdout)
    manager = dsv4_jax.KVCacheManager.from_memory(
        dsv4_jax.DSV4Config.flash(), 64 << 20, max_concurrent_requests=1, max_context_len=2048
    )
    expect("bytes of a request", report["bytes_per_request"] < manager.memory_bytes() <= 64 << 20, True)
    command = ("generate", "--json", "--quiet", "-n", "24", "--ignore-eos", "def main():\n    import ")
    with_library = json.loads(run(*command).stdout)["results"][0]["text"]
    with tempfile.TemporaryDirectory() as nothing:
        plain = run(*command, DSV4_JAX_LIB_DIR=nothing)
    if not with_library:
        raise SystemExit("smoke: the checkpoint in the package wrote nothing")
    expect("text in plain jax.numpy is the same", json.loads(plain.stdout)["results"][0]["text"], with_library)


if __name__ == "__main__":
    main()
