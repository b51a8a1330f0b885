"""Timing on a GPU: a row is prepared (data, compilation, first call) apart from the others, and measured alone."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS: list[dict] = []


@dataclass
class Row:
    """One row of the table, ready to be measured."""

    name: str
    call: Callable[[Any], Any]  # state -> state; compiled, and called once
    state: Any
    per: int = 1  # operations in a call
    total: int | None = None  # least bytes an operation must move
    target: float | None = None  # microseconds
    arithmetic: float | None = None  # microseconds of its products at the chip's full rate
    peer: tuple[str, float] | None = None  # who published which microseconds for as much work
    host: bool = False  # whether to report also how long the host is busy with a call


def warmed(name: str, call: Callable[[Any], Any], state: Any, **options: Any) -> Row:
    """A row whose call has been compiled and made once."""
    return Row(name, call, jax.block_until_ready(call(state)), **options)


def median_microseconds(
    call: Callable[[Any], Any], state: Any, *, calls: int = 5, repeats: int = 7
) -> tuple[float, Any]:
    """Median over repeats of the time of one call, several in flight, after warm-up; and the state after them."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(calls):
            state = call(state)
        jax.block_until_ready(state)
        if repeat >= 2:
            times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times), state


def host_microseconds(call: Callable[[Any], Any], state: Any, *, calls: int = 30) -> float:
    """Median time until a call comes back to the host, with nothing else under way."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        state = call(state)
        times.append(time.perf_counter() - start)
        jax.block_until_ready(state)
    return statistics.median(times) * 1e6


@functools.cache
def copier(total: int) -> tuple[Callable[[Any], Any], int]:
    """A compiled call that makes some copies of total / 2 bytes each, of arrays together beyond the L2; how many."""
    count = max(4, min(64, -(-(256 << 20) // max(total, 1))))
    words = np.random.default_rng(total).integers(0, 1 << 32, max(total // 8, 1), np.uint32)
    arrays = [jax.device_put(words + np.uint32(i)) for i in range(count)]
    step = jax.jit(lambda arrays: [jnp.copy(a) for a in arrays])
    jax.block_until_ready(step(arrays))
    return lambda _: step(arrays), count


@functools.cache
def copy_microseconds(total: int) -> float:
    """Time of a device-to-device copy that reads and writes `total` bytes together."""
    call, count = copier(total)
    return median_microseconds(call, None)[0] / count


def report(
    name: str,
    took: float,
    *,
    total: int | None = None,
    target: float | None = None,
    arithmetic: float | None = None,
    peer: tuple[str, float] | None = None,
) -> None:
    """Prints and keeps one row; total: the least bytes that must move; the others as in `Row`."""
    row = {"name": name, "us": took, "target_us": target}
    text = f"{name:66} {took:8.2f} us"
    if target is not None:
        text += f"  target {target:6.1f}"
    if total is not None:
        floor = copy_microseconds(total)
        row |= {"bytes": total, "copy_us": floor, "of_copy": floor / took, "TB_per_s": total / took / 1e6}
        text += f"  copy {floor:7.2f}  {floor / took:4.0%}  {total / took / 1e6:5.2f} TB/s"
    if arithmetic is not None:
        row["arithmetic_us"] = arithmetic
        text += f"  arithmetic {arithmetic:7.2f}"
    if peer is not None:
        row |= {"peer": peer[0], "peer_us": peer[1]}
        text += f"  {peer[0]} {peer[1]:6.1f}"
    RESULTS.append(row)
    print(text, flush=True)


def fact(name: str, value: float, unit: str) -> None:
    """Prints and keeps a number that is not a time on the device."""
    RESULTS.append({"name": name, "value": value, "unit": unit})
    print(f"{name:66} {value:12,.1f} {unit}", flush=True)


def failed(name: str, error: Exception) -> None:
    """One failing row does not lose the others."""
    RESULTS.append({"name": name, "error": str(error)[:500]})
    print(f"{name}: FAILED: {str(error)[:300]}", flush=True)


def run(benchmarks: Iterable[Callable[[], Row]], workers: int = 8) -> None:
    """Prepares all rows side by side, then measures them one after the other."""
    with ThreadPoolExecutor(workers) as pool:
        prepared = [(b, pool.submit(b)) for b in benchmarks]
        rows = []
        for benchmark, future in prepared:
            try:
                rows.append(future.result())
            except Exception as error:
                failed(f"{benchmark}", error)
        list(pool.map(copier, {row.total for row in rows if row.total is not None}))
    for row in rows:
        try:
            took, row.state = median_microseconds(row.call, row.state)
            report(
                row.name, took / row.per, total=row.total, target=row.target, arithmetic=row.arithmetic, peer=row.peer
            )
            if row.host:
                fact(f"{row.name}: host time of a call", host_microseconds(row.call, row.state), "us")
        except Exception as error:
            failed(row.name, error)
        row.state = None
