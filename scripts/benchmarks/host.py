"""CPU time that the host takes for a decode step: planning it, and taking its cache back.

A step that does nothing but enter the plan's blocks stands for the model's; it is waited for and not counted.
"""

import argparse
import time

import numpy as np


def measure(slots: int, steps: int) -> tuple[float, float]:
    """Median microseconds of `plan_step` and of assigning `manager.cache`, every slot decoding."""
    import jax

    from dsv4_jax import DSV4Config, KVCacheManager

    config = DSV4Config.flash().replace(num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128))
    blocks = slots * -(-steps // 128)
    manager = KVCacheManager(
        config, config.schedule, max_concurrent_requests=slots, num_blocks_per_csa_layer=blocks,
        num_blocks_per_hca_layer=blocks, max_context_len=max(steps, 128),
    )  # fmt: skip
    step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)
    running = np.array([manager.admit_request() for _ in range(slots)], np.int32)
    times = []
    for position in range(steps):
        positions = np.full(slots, position, np.int32)
        start = time.process_time()
        plan = manager.plan_step(running, positions)
        planned = time.process_time()
        cache = jax.block_until_ready(step(manager.cache, plan))
        returned = time.process_time()
        manager.cache = cache
        times.append((planned - start, time.process_time() - returned))
        del plan
    plan_time, assign_time = np.median(times[steps // 10 :], axis=0) * 1e6
    return plan_time, assign_time


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="scripts/bench host", description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 32, 128], help="requests (default 1 32 128)")
    parser.add_argument("--steps", type=int, default=300, help="decode steps of a run (default 300)")
    parser.add_argument("--repeat", type=int, default=3, help="runs, the fastest counts (default 3)")
    options = parser.parse_args()
    print(f"{'slots':>6}{'plan_step':>14}{'cache = …':>14}")
    for slots in options.slots:
        planning, assigning = min(measure(slots, options.steps) for _ in range(options.repeat))
        print(f"{slots:6}{planning:11.0f} us{assigning:11.0f} us", flush=True)


if __name__ == "__main__":
    main()
