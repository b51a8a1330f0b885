"""Rows of the GPU benchmark: what all layers of V4-Flash write in a decode step, and what its cache costs."""

import itertools
import re
import time

import jax
import jax.numpy as jnp
from gpu_timing import Row, fact, warmed

from dsv4_jax import DSV4Config, build_schedule
from dsv4_jax.cache.cost import cache_cost
from dsv4_jax.cache.formats import RECORD_FORMATS
from dsv4_jax.cache.handle import LayerCacheHandle
from dsv4_jax.cache.kv_cache import KVCache
from dsv4_jax.cache.plan import StepPlan
from dsv4_jax.cache.schema import CacheSchema, build_schema
from dsv4_jax.ops.nn.rope import rope_angles, rope_frequencies
from dsv4_jax.ops.write.append_swa_fused import RawWindow
from dsv4_jax.ops.write.compress import CompressorWeights, Projections

Array = jax.Array
CONFIG = DSV4Config.flash()
SCHEDULE = build_schedule(CONFIG)
AT_ONCE = ", one launch a layer"
CACHES: list[dict] = [{}]
if "hca_tail" in CacheSchema.__dataclass_fields__:
    CACHES.append({"hca_tail": "running"})


def described(options: dict) -> str:
    """The options of a cache, as the table names them."""
    return "".join(f", {key} {value}" for key, value in options.items())


def new_cache(batch: int, options: dict, columns: int = 8) -> KVCache:
    """A cache with every block given out: contexts of up to 128 * columns tokens."""
    schemas = tuple(build_schema(CONFIG, spec, **options) for spec in SCHEDULE)
    blocks, of_request = (dict.fromkeys(("csa", "hca"), n) for n in (batch * columns, columns))
    cache = KVCache.allocate(schemas, batch, blocks, of_request)
    table = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
    return cache.replace_tables({kind: jnp.copy(table) for kind in cache.block_table})


def step_inputs(batch: int) -> dict:
    """Projections (batch, ...) bfloat16 as every layer gets them, and weights of compressors by (ratio, dim)."""
    frequencies = jnp.asarray(rope_frequencies(64, 160000.0, factor=16.0, original_max_position=65536))
    shapes = {"swa": (512,), "csa": (1024, 1024), "hca": (512, 512), "indexer": (256, 256)}
    keys = iter(jax.random.split(jax.random.key(0), 16))
    projections = {
        name: [jax.random.normal(next(keys), (batch, width), jnp.bfloat16) for width in widths]
        for name, widths in shapes.items()
    }
    sizes = {"csa": (4, 2, 512), "hca": (128, 1, 512), "indexer": (4, 2, 128)}
    weights = {
        name: CompressorWeights(jax.random.normal(next(keys), (ratio, lanes * dim)), jnp.ones(dim), frequencies)
        for name, (ratio, lanes, dim) in sizes.items()
    }
    return {"projections": projections, "weights": weights, "frequencies": frequencies}


def write_all(cache: KVCache, positions: Array, inputs: dict, one_launch: bool) -> KVCache:
    """All that the 43 layers write for a token of every slot, in one launch a layer or in one for each part."""
    plan = StepPlan(jnp.arange(positions.shape[0], dtype=jnp.int32), positions)
    window = RawWindow(*inputs["projections"]["swa"], jnp.ones(512), *rope_angles(positions, inputs["frequencies"]))
    parts = {name: Projections(*inputs["projections"][name], weights) for name, weights in inputs["weights"].items()}
    for spec in SCHEDULE:
        kind = spec.attn.name.lower()
        compressor, indexer = parts.get(kind), parts["indexer"] if kind == "csa" else None
        handle = LayerCacheHandle(cache, plan, spec.layer_idx)
        if one_launch:
            handle = handle.write_layer(window, compressor, indexer)
        else:
            handle = handle if indexer is None else handle.write_indexer(*indexer)
            handle = handle if compressor is None else handle.write_compressed(*compressor)
            handle = handle.write_swa_fused(*window)
        cache = handle.cache
    return cache


def _program(steps: int, inputs: dict, one_launch: bool):
    """A jitted call of some steps: (cache, positions) -> the same after them; the cache is donated."""

    def one(_, state):
        cache, positions = state
        return write_all(cache, positions, inputs, one_launch), (positions + 1) % 1000

    def call(state):
        # An iteration of XLA's loop costs some 22 us on an H200: four steps share one.
        return one(0, state) if steps == 1 else jax.lax.fori_loop(0, steps, one, state, unroll=4)

    return jax.jit(call, donate_argnums=0)


def _state(batch: int, options: dict) -> tuple[KVCache, Array]:
    """Requests of different lengths: a window closes for a fourth of them, or for one in 128, in every step."""
    return new_cache(batch, options), jnp.arange(batch, dtype=jnp.int32) * 37 % 900


def all_writes(*, steps: int, options: dict, target: float, one_launch: bool = False, batch: int = 64) -> Row:
    """The writes of a decode step, `steps` of them in one jitted call."""
    return warmed(
        f"all writes of a V4-Flash step, batch {batch}, {steps} in a call{described(options)}{AT_ONCE * one_launch}",
        _program(steps, step_inputs(batch), one_launch),
        _state(batch, options),
        per=steps,
        target=target,
        host=True,
    )


def report_program(batch: int = 64) -> None:
    """Compile time of a step, and the launches that its program has in a layer."""
    for options, one_launch in itertools.product(CACHES, (False, True)):
        lowered = _program(1, step_inputs(batch), one_launch).lower(_state(batch, options))
        start = time.perf_counter()
        compiled = lowered.compile()
        took = time.perf_counter() - start
        text, name = compiled.as_text(), f"43-layer step{described(options)}{AT_ONCE * one_launch}"
        calls = re.findall(r'custom_call_target="(dsv4_\w+)"', text)
        fact(f"{name}: compile time", took, "s")
        fact(f"{name}: native launches", len(calls), "")
        for target in sorted(set(calls)):
            fact(f"{name}: of {target}", calls.count(target), "")
        fact(f"{name}: native launches a layer", len(calls) / len(SCHEDULE), "")
        fact(f"{name}: XLA kernels beside them (fusions)", len(re.findall(r" fusion\(", text)), "")
        memory = compiled.memory_analysis()
        fact(f"{name}: bytes updated in place", memory.alias_size_in_bytes, "B")
        fact(f"{name}: bytes of temporaries", memory.temp_size_in_bytes, "B")


def report_bytes() -> None:
    """What each form of the cache costs a request and a token."""
    forms = [{"cache_dtype": form} for form in RECORD_FORMATS] + [{"cache_dtype": "fp8", "indexer_dtype": "mxfp4"}]
    for form in forms:
        for options in CACHES:
            cost = cache_cost(CONFIG, SCHEDULE, **form, **options)
            name = " + ".join(form.values()) + described(options)
            if not options:
                fact(f"V4-Flash, {name}: growing bytes of a token", cost.per_token, "B")
            fact(f"V4-Flash, {name}: bytes of a request besides", cost.per_request, "B")
