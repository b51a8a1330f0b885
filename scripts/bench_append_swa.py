"""Times append_swa on a GPU against a copy of as many bytes, and in decode-sized calls inside one jitted program."""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from dsv4_jax.ops.append_swa import SWARing, append_swa

RECORD_BYTES = 448 + 2 * 64 + 4 + 4  # codes, RoPE half, scale, position


def new_ring(layers, slots, rows=128):
    shape = (layers, slots, rows)
    return SWARing(
        nope=jnp.zeros((*shape, 448), jnp.uint8),
        rope=jnp.zeros((*shape, 64), jnp.bfloat16),
        inv_scale=jnp.zeros(shape, jnp.float32),
        pos=jnp.full(shape, -1, jnp.int32),
        head=jnp.zeros(shape[:-1], jnp.int32),
    )


def microseconds(call, state, *, calls, repeats):
    """Median over repeats of the time of one call, many in flight, after warm-up."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(calls):
            state = call(state)
        jax.block_until_ready(state)
        if repeat >= 2:
            times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def prefill(implementation, dtype, tokens=65536):
    """Microseconds of one more append of many tokens, each to a layer of its own: all data is larger than the L2.

    Deciding which tokens write is the same for all layers of a step; it drops out of the difference.
    """
    order = jax.random.permutation(jax.random.key(1), tokens // 128).astype(jnp.int32)
    slots, positions = jnp.repeat(order, 128), jnp.arange(tokens, dtype=jnp.int32) % 128

    def step_time(layers):
        kv = [jax.random.normal(jax.random.key(i), (tokens, 512), dtype) for i in range(layers)]

        @functools.partial(jax.jit, donate_argnums=0)
        def step(ring, kv, slots, positions):
            for layer in range(layers):
                ring = append_swa(ring, kv[layer], slots, positions, layer=layer, implementation=implementation)
            return ring

        return microseconds(
            lambda ring: step(ring, kv, slots, positions), new_ring(layers, tokens // 128), calls=10, repeats=7
        )

    return (step_time(12) - step_time(4)) / 8


def copy_bytes(total):
    """Microseconds of one more device-to-device copy that reads and writes `total` bytes together."""

    def step_time(count):
        arrays = [jax.random.bits(jax.random.key(i), (total // 8,), jnp.uint32) for i in range(count)]
        step = jax.jit(lambda arrays: [jnp.copy(a) for a in arrays])
        return microseconds(lambda _: step(arrays), None, calls=10, repeats=7)

    return (step_time(12) - step_time(4)) / 8


def decode(implementation, tokens, layers=43, steps=4):
    """Microseconds of one append in decode: all layers and several steps unrolled in one program."""
    kv = jax.random.normal(jax.random.key(0), (tokens, 512), jnp.bfloat16)
    slots = jnp.arange(tokens, dtype=jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(ring, positions, kv, slots):
        for _ in range(steps):
            for layer in range(layers):
                ring = append_swa(
                    ring, kv, slots, positions, layer=layer, one_token_per_slot=True, implementation=implementation
                )
            positions = positions + 1
        return ring, positions

    state = new_ring(layers, tokens), jnp.zeros(tokens, jnp.int32)
    return microseconds(lambda s: run(*s, kv, slots), state, calls=10, repeats=5) / (layers * steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write the results to")
    arguments = parser.parse_args()
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float32, 4)):
        total = 65536 * (512 * size + RECORD_BYTES + 12)  # 12: slot, position, role
        floor = copy_bytes(total)
        took = prefill("cuda", dtype)
        name = f"prefill 65536 {jnp.dtype(dtype).name}"
        results[name] = {"us": took, "copy_us": floor, "of_copy": floor / took, "TB_per_s": total / took / 1e6}
        print(
            f"{name}: {took:.1f} us, copy {floor:.1f} us, {floor / took:.0%} of the copy, {total / took / 1e6:.2f} TB/s"
        )
    for tokens in (1, 16, 64, 256):
        took = decode("cuda", tokens)
        results[f"decode {tokens}"] = {"us": took}
        print(f"decode {tokens}: {took:.2f} us a call")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
