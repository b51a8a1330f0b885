"""Relative error of every storage format of the cache: what is read back, against what was stored.

The error of a vector is |read - stored| / |stored|. Two kinds of vectors: normal values, and normal values of which one
in 64 is 20 times as large, as activations have them. Bits per byte through a model: scripts/bench quality.
"""

import argparse
import json
import pathlib

HEAD_DIM, ROPE_DIM, INDEX_HEAD_DIM = 512, 64, 128


def vectors(kind: str, count: int, dim: int):
    """(count, dim) float32, the same every time; kind "normal" | "outliers"."""
    import numpy as np

    rng = np.random.default_rng(512)
    x = rng.normal(size=(count, dim)).astype(np.float32)
    return x if kind == "normal" else np.where(rng.random(x.shape) < 1 / 64, 20 * x, x).astype(np.float32)


def measure(count: int = 4096) -> dict[str, dict[str, float]]:
    """By format ("fp8" …, "nvfp4 keys" …): bytes of a vector and the mean and largest relative error of each kind."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax.cache.formats import INDEXER_FORMATS, RECORD_FORMATS, key_bytes
    from dsv4_jax.ops.formats.fp4 import GROUP_SIZE, dequantise_fp4, hadamard
    from dsv4_jax.ops.formats.record import decode_record, encode_record
    from dsv4_jax.ops.write.compress import encode_keys

    def record(format, x):
        like = format.allocate((), HEAD_DIM - ROPE_DIM, ROPE_DIM)
        return decode_record(encode_record(x, like))

    def key(name, x):
        keys = encode_keys(x, name)
        if name not in GROUP_SIZE:
            return keys.keys.astype(jnp.float32)
        return hadamard(dequantise_fp4(keys.keys, keys.scale, name))  # the rotation is its own inverse

    found = {}
    for names, dim, size, store, suffix in (
        (RECORD_FORMATS, HEAD_DIM, lambda n: RECORD_FORMATS[n].record_bytes(HEAD_DIM - ROPE_DIM, ROPE_DIM),
         lambda n, x: record(RECORD_FORMATS[n], x), ""),
        (INDEXER_FORMATS, INDEX_HEAD_DIM, lambda n: key_bytes(n, INDEX_HEAD_DIM), key, " keys"),
    ):  # fmt: skip
        for name in names:
            row = found[name + suffix] = {"bytes": size(name)}
            for kind in ("normal", "outliers"):
                x = jnp.asarray(vectors(kind, count, dim))
                read = jax.jit(lambda x, store=store, name=name: store(name, x))(x)
                error = jnp.linalg.norm(read - x, axis=-1) / jnp.linalg.norm(x, axis=-1)
                row[f"{kind} mean"], row[f"{kind} max"] = float(error.mean()), float(error.max())
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="scripts/bench records", description=__doc__)
    parser.add_argument("--count", type=int, default=4096, help="vectors of each kind (default 4096)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()
    found = measure(options.count)
    print(f"{'relative error':16}{'bytes':>7}{'normal, mean':>15}{'largest':>10}{'outliers, mean':>17}{'largest':>10}")
    for name, row in found.items():
        size, *errors = row.values()
        cells = [f"{error:>{width}.3%}" for error, width in zip(errors, (15, 10, 17, 10), strict=True)]
        print(f"{name:16}{size:>7,}{''.join(cells)}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
