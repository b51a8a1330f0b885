"""Loading a model, with a progress bar."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

import dsv4_jax

from .errors import InputError, one_line
from .terminal import in_background, make_bytes_progress


def load_model(
    folder: pathlib.Path, console: Console, dtype: str = "float32", devices: int = 1, model_devices: int = 1
) -> Any:
    """The model of the checkpoint in `folder`, over that many devices; InputError for a file or too many."""
    if folder.is_file():
        raise InputError(f"{folder} is a file: expected the folder of a checkpoint, with its config.json")

    check_devices()
    mesh = make_mesh(devices, model_devices) if devices > 1 or model_devices > 1 else None

    def load() -> Iterator[Any]:
        yield dsv4_jax.from_pretrained(
            folder, dtype=dtype, mesh=mesh, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )

    with make_bytes_progress(console) as bar:
        task = bar.add_task("loading", total=None)
        (model,) = in_background(load)
    return model


def check_devices() -> None:
    """InputError where JAX finds no device that it may use."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # whatever the plugin of a platform raises, an AssertionError too
        wanted = getattr(jax.config, "jax_platforms", None)
        if not wanted:
            raise InputError(f"JAX finds no device: {one_line(error)}") from None
        raise InputError(
            f"JAX_PLATFORMS is {wanted!r}, but JAX finds no such device here: expected cpu, or a JAX for it (pip "
            "install '.[cuda12]' or '.[cuda13]') and its driver"
        ) from None


def keep_programs(wanted: bool) -> None:
    """Keeps compiled programs for the next run, in a folder of the user's, unless JAX has been told where.

    The folder is dsv4_jax/compiled in XDG_CACHE_HOME, by default ~/.cache. Where it cannot be made, nothing is kept.
    """
    import jax

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(caches) / "dsv4_jax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_mesh(devices: int, model_devices: int = 1) -> Any:
    """A mesh of the first devices, of which model_devices divide heads; InputError where there are fewer."""
    import jax
    import numpy as np

    there = jax.devices()
    if devices > len(there):
        hint = ""
        if there[0].platform == "cpu":
            hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes as many of a CPU"
        raise InputError(f"--devices is {devices}: JAX has {len(there)} ({there[0].device_kind}){hint}")
    if devices % model_devices:
        raise InputError(f"--model-devices is {model_devices}: expected a number that divides {devices} devices")
    if model_devices == 1:
        return jax.sharding.Mesh(np.array(there[:devices]), ("data",))
    return jax.sharding.Mesh(np.array(there[:devices]).reshape(-1, model_devices), ("data", "model"))
