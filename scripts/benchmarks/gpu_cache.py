"""What all layers of V4-Flash do with the cache in a decode step: as one program, and part by part.

No weights of a model: the inputs are the same for every layer, but that a layer's output is the next one's query and a
slice of it, one more kernel, its kv. A layer is write_layer, attend and between them, where it has an indexer, select.
"""

import collections
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from gpu_step import CONFIG, SCHEDULE, step_inputs
from gpu_timing import fact, failed, median_microseconds, report

from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.schema import build_schema
from dsv4_jax.ops.nn.rope import rope_angles
from dsv4_jax.ops.read.attend import RawQuery
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import Projections

Array = jax.Array

BATCHES, CONTEXTS = (1, 16, 64, 128), (4096, 65_536, 1 << 20)
MOST_TOKENS = 16 << 20
"""Tokens that memory holds; of longer batches each block is of several requests, but for the newest."""

PARTS = ("write_layer", "select", "attend")
GOAL = 107  # native calls


def new_cache(batch: int, context: int) -> KVCache:
    """Every request has blocks for a block more than `context` tokens; random contents without a NaN."""
    columns = context // CONFIG.block_size + 1
    own = min(batch, MOST_TOKENS // context)
    request, column = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(columns, dtype=jnp.int32)
    shared = request % own * columns + column
    table = jnp.where(column < columns - 2, shared, own * columns + 2 * request + column - (columns - 2))
    blocks = own * columns + 2 * batch
    schemas, kinds = tuple(build_schema(CONFIG, spec) for spec in SCHEDULE), ("csa", "hca")
    cache = KVCache.allocate(schemas, batch, dict.fromkeys(kinds, blocks), dict.fromkeys(kinds, columns))

    def random(x: Array) -> Array:
        if x.dtype == jnp.int32:
            return x
        places = (
            jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(0x9E3779B1 + 2 * axis)
            for axis in range(x.ndim)
        )
        place = sum(places, jnp.uint32(1))
        byte = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B) >> 24
        if x.dtype == jnp.uint8:
            return (byte & 0xB7).astype(jnp.uint8)
        return ((byte.astype(jnp.float32) + 1) / 256).astype(x.dtype)

    return jax.tree.map(random, cache).replace_tables(dict.fromkeys(kinds, table))


def new_inputs(batch: int, context: int) -> dict:
    """What a step gets but for the cache. Requests of slightly different lengths: a window closes for a few."""
    heads, index_heads = CONFIG.num_attention_heads, CONFIG.index_n_heads
    return step_inputs(batch) | {
        "positions": context - 2 - jnp.arange(batch, dtype=jnp.int32) * 37 % 128,
        "q": jax.random.normal(jax.random.key(5), (batch, heads, CONFIG.head_dim), jnp.bfloat16),
        "index_q": jax.random.normal(jax.random.key(6), (batch, index_heads, CONFIG.index_head_dim), jnp.bfloat16),
        "index_weights": jax.random.normal(jax.random.key(7), (batch, index_heads)),
        "chosen": jax.random.randint(jax.random.key(8), (batch, CONFIG.index_topk), 0, context // 4, jnp.int32),
    }


def step(cache: KVCache, inputs: dict, parts: tuple[str, ...]) -> tuple[KVCache, list[Array]]:
    """Some of the parts of every layer: the cache after them, and the last of what they return."""
    positions = inputs["positions"]
    plan = StepPlan(jnp.arange(positions.shape[0], dtype=jnp.int32), positions)
    angles = rope_angles(positions, inputs["frequencies"])
    (kv,) = inputs["projections"]["swa"]
    of = {name: Projections(*inputs["projections"][name], weights) for name, weights in inputs["weights"].items()}
    q, sink, every = inputs["q"], jnp.zeros(CONFIG.num_attention_heads), []
    for spec in SCHEDULE:
        kind = spec.attn.name.lower()
        handle = LayerCacheHandle(cache, plan, spec.layer_idx)
        if "write_layer" in parts:
            # Where nothing said that a layer follows the one before, XLA would copy what it writes to.
            kv = q[:, 0] if "attend" in parts and spec.layer_idx else kv
            window = RawWindow(kv, jnp.ones(CONFIG.head_dim), *angles)
            handle = handle.write_layer(window, of.get(kind), of["indexer"] if kind == "csa" else None)
        chosen = inputs["chosen"] if kind == "csa" else None
        if kind == "csa" and "select" in parts:
            of_index = inputs["index_q"], inputs["index_weights"], CONFIG.index_topk
            chosen = handle.select(*of_index, raw=angles)
            if "attend" not in parts:
                every.append(chosen)
        if "attend" in parts:
            q = handle.attend(q, sink, selected=chosen, raw=RawQuery(*angles, 1e-6))
        cache = handle.cache
    return cache, [*every, q]


def compiled(batch: int, context: int) -> dict[str, Callable]:
    """Programs: of the cache, of the step and of each part, by name."""
    cache, inputs = jax.eval_shape(lambda: (new_cache(batch, context), new_inputs(batch, context)))
    made = {"cache": jax.jit(lambda: (new_cache(batch, context), new_inputs(batch, context))).lower().compile()}
    for name in ("step", *PARTS):
        parts = PARTS if name == "step" else (name,)
        # What a part only reads is no result of it.
        writes = "write_layer" in parts
        call = jax.jit(
            lambda cache, inputs, parts=parts, writes=writes: step(cache, inputs, parts)[0 if writes else 1 :],
            donate_argnums=0 if writes else (),
        )
        made[name] = call.lower(cache, inputs).compile()
    return made


def report_program(name: str, program: Callable) -> None:
    """What the step's program calls, and what it needs beside the cache."""
    calls = collections.Counter(re.findall(r'custom_call_target="(dsv4_\w+)"', program.as_text()))
    fact(f"{name}: native calls (at most {GOAL})", sum(calls.values()), "")
    for target, count in sorted(calls.items()):
        fact(f"{name}: of {target}", count, "")
    memory = program.memory_analysis()
    fact(f"{name}: bytes updated in place", memory.alias_size_in_bytes, "B")
    fact(f"{name}: bytes of temporaries", memory.temp_size_in_bytes, "B")


def measure(batch: int, context: int, programs: dict[str, Callable]) -> None:
    """The rows of one batch and context."""
    cache, inputs = programs["cache"]()
    name = f"cache step, context {context}, batch {batch}"
    if batch * context > MOST_TOKENS:
        name += f" (blocks of {MOST_TOKENS // context} requests)"
    report_program(name, programs["step"])
    fact(f"{name}: bytes of the cache", cache.memory_bytes(), "B")
    several = {"calls": 3, "repeats": 5} if batch * context > 1 << 22 else {}
    times = {}
    for part in ("step", *PARTS):
        program, writes = programs[part], part in ("step", "write_layer")

        def call(state: tuple, program: Callable = program, writes: bool = writes) -> tuple:
            out = program(state[0], inputs)
            return out if writes else (state[0], out)

        times[part], (cache, _) = median_microseconds(call, (cache, None), **several)
    report(name, times["step"])
    for part in PARTS:
        report(f"{name}: {part} alone", times[part])
    report(f"{name}: sum of its parts", sum(times[part] for part in PARTS))


def run() -> None:
    """All rows: programs are compiled side by side, caches made one after the other."""
    cases = [(batch, context) for context in CONTEXTS for batch in BATCHES]
    with ThreadPoolExecutor(8) as pool:
        programs = {case: pool.submit(compiled, *case) for case in cases}
    for case, made in programs.items():  # with nothing else under way
        try:
            measure(*case, made.result())
        except Exception as error:
            failed(f"cache step, context {case[1]}, batch {case[0]}", error)
