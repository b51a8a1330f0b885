"""Rows of the GPU benchmark: records and keys gathered and dequantised."""

import jax
import jax.numpy as jnp
from gpu_timing import Row, warmed

from dsv4_jax.cache.formats import key_bytes, record_format
from dsv4_jax.ops.formats.fp4 import GROUP_SIZE
from dsv4_jax.ops.formats.record import Record
from dsv4_jax.ops.read.entries import read_entries, read_keys
from dsv4_jax.ops.read.window import read_window
from dsv4_jax.ops.write.append_swa import SWARing
from dsv4_jax.ops.write.compress import IndexerKeys

Array = jax.Array


def random_bytes(seed: int, *shape: int) -> Array:
    """Any byte but those of a NaN code or scale."""
    return jax.random.randint(jax.random.key(seed), shape, 96, 127, jnp.uint8)


def random_records(form: str, *shape: int) -> Record:
    """Records of 448 + 64 values."""
    scale = random_bytes(2, *shape, 8) if form == "fp8_ue8m0" else jax.random.uniform(jax.random.key(2), shape)
    return Record(random_bytes(0, *shape, 448), jax.random.normal(jax.random.key(1), (*shape, 64), jnp.bfloat16), scale)


def vector_bytes(form: str, dtype) -> int:
    """Bytes that reading one record as `dtype` must move."""
    return record_format(form).record_bytes(448, 64) + 512 * jnp.dtype(dtype).itemsize


def chosen_entries(form: str, dtype, tokens: int = 512, chosen: int = 512, layers: int = 4) -> Row:
    """Entries that an indexer has chosen for each token, anywhere in requests of 32,768 tokens."""
    slots, columns = 64, 256
    pool = random_records(form, layers, slots * columns, 32)
    table = jax.random.permutation(jax.random.key(3), slots * columns).astype(jnp.int32).reshape(slots, columns)
    at = jnp.arange(tokens, dtype=jnp.int32) % slots
    counts = jnp.full(tokens, columns * 32, jnp.int32)
    selected = jax.random.randint(jax.random.key(4), (layers, tokens, chosen), 0, columns * 32, jnp.int32)

    @jax.jit
    def run(pool, table, at, counts, selected):
        return [read_entries(pool, table, at, counts, selected[i], layer=i, dtype=dtype) for i in range(layers)]

    return warmed(
        f"read_entries, {tokens * chosen} chosen entries, {form} as {jnp.dtype(dtype).name}",
        lambda _: run(pool, table, at, counts, selected),
        None,
        per=layers,
        total=tokens * chosen * (vector_bytes(form, dtype) + 4),
    )


def window(form: str, dtype, batch: int = 64, layers: int = 43) -> Row:
    """The whole window of every request of a decode step."""
    shape = (layers, batch, 128)
    ring = SWARing(*random_records(form, *shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], jnp.int32))
    slots, newest = jnp.arange(batch, dtype=jnp.int32), jnp.arange(batch, dtype=jnp.int32) + 1000

    @jax.jit
    def run(ring, slots, newest):
        return [read_window(ring, slots, newest, layer=i, window=128, dtype=dtype)[0] for i in range(layers)]

    name = f"read_window, decode, batch {batch}, {form} as {jnp.dtype(dtype).name}"
    total = batch * 128 * vector_bytes(form, dtype)
    return warmed(name, lambda _: run(ring, slots, newest), None, per=layers, total=total)


def all_keys(form: str, batch: int = 16, columns: int = 256, layers: int = 4) -> Row:
    """Every indexer key of requests of 32,768 tokens, as float32."""
    pool = (layers, batch * columns, 32)
    keys = IndexerKeys(random_bytes(0, *pool, 64), random_bytes(1, *pool, 128 // GROUP_SIZE[form]))
    table = jax.random.permutation(jax.random.key(3), batch * columns).astype(jnp.int32).reshape(batch, columns)
    slots, counts = jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, columns * 32, jnp.int32)

    @jax.jit
    def run(keys, table, slots, counts):
        return [read_keys(keys, table, slots, counts, format=form, layer=i) for i in range(layers)]

    total = batch * columns * 32 * (key_bytes(form, 128) + 512)
    name = f"read_keys, {batch * columns * 32} keys, {form} as float32"
    return warmed(name, lambda _: run(keys, table, slots, counts), None, per=layers, total=total)
