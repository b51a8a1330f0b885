"""Whether a cache fits the device, asked before it is allocated."""

import logging
import os

import jax
import jax.numpy as jnp

WARN_SHARE = 0.25
"""Share of the device's memory from which on a cache's size is worth a warning."""


def default_device() -> jax.Device:
    """Where arrays go that nobody places."""
    return next(iter(jnp.zeros(()).devices()))


def device_memory() -> int | None:
    """Bytes that JAX may use on the device where arrays go by default; of a CPU the machine's. None if unknown."""
    device = default_device()
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system says
        return None


def check_memory(num_bytes: int, what: str, devices: int = 1) -> None:
    """ValueError for a cache that is larger than the device's memory; a warning in the log for a large one.

    devices: how many of this process have such a cache; on a CPU they share its memory.
    """
    memory = device_memory()
    if memory is None:
        return
    if devices > 1 and default_device().platform == "cpu":
        num_bytes, what = num_bytes * devices, f"{what} on each of {devices} CPU devices"
    gib = f"{num_bytes / 2**30:,.1f} GiB"
    if num_bytes > memory:
        raise ValueError(
            f"a cache for {what} takes {gib}: the device has {memory / 2**30:,.1f} GiB; fewer or shorter requests need "
            "less, or requests that share blocks (KVCacheManager.from_memory)"
        )
    if num_bytes > WARN_SHARE * memory:
        logging.getLogger(__name__).warning(
            "the cache for %s takes %s of the device's %.1f GiB", what, gib, memory / 2**30
        )
