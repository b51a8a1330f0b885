"""Loading a model, with a progress bar."""

import pathlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import dsv4_jax

from .errors import InputError
from .terminal import in_background, make_bytes_progress


def load_model(folder: pathlib.Path, console: Console, dtype: str = "float32", devices: int = 1) -> Any:
    """The model of the checkpoint in `folder`, over that many devices; InputError for a file or too many."""
    if folder.is_file():
        raise InputError(f"{folder} is a file: expected the folder of a checkpoint, with its config.json")

    mesh = make_mesh(devices) if devices > 1 else None

    def load() -> Iterator[Any]:
        yield dsv4_jax.from_pretrained(
            folder, dtype=dtype, mesh=mesh, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )

    with make_bytes_progress(console) as bar:
        task = bar.add_task("loading", total=None)
        (model,) = in_background(load)
    return model


def make_mesh(devices: int) -> Any:
    """A mesh of the first devices; InputError where there are fewer."""
    import jax
    import numpy as np

    there = jax.devices()
    if devices > len(there):
        hint = ""
        if there[0].platform == "cpu":
            hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes as many of a CPU"
        raise InputError(f"--devices is {devices}: JAX has {len(there)} ({there[0].device_kind}){hint}")
    return jax.sharding.Mesh(np.array(there[:devices]), ("data",))
