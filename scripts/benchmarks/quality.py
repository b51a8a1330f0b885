"""Bits per byte of Python source, read through the cache in each storage format, beside the exact (fp32) cache.

Every text is fed through the cache in steps, as a prompt would be; each next byte is scored by what the model says
after reading its past out of the cache. "released" rows: the same with the weights as a release stores them, FP8 with
FP4 experts (see dsv4-jax quantize).
"""

import argparse
import json
import math
import pathlib
import platform
import tempfile
import time
from functools import partial

import texts

FORMATS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "fp8+nvfp4": ("fp8", "nvfp4"),
    "fp8+mxfp4": ("fp8", "mxfp4"),
    "fp8_ue8m0+mxfp4": ("fp8_ue8m0", "mxfp4"),
}
RELEASED = "released "
NAMES = [*FORMATS, *(f"{RELEASED}{name}" for name in ("fp32", "fp8_ue8m0+mxfp4"))]


def make_step(graphdef):
    """The jitted step: (weights, cache, plan, ids (T,), next ids (T,)) -> nats of each next id (T,), cache."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    @partial(jax.jit, donate_argnums=1)
    def step(weights, cache, plan, token_ids, next_ids):
        model = nnx.merge(graphdef, weights)
        logits, cache = model(token_ids, cache, plan)
        chosen = jnp.take_along_axis(logits, next_ids[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, cache

    return step


def score(model, sources: list[bytes], width: int, cache_dtype: str, indexer_dtype: str) -> tuple[float, float]:
    """Bits per byte of `sources`, and the seconds it took."""
    import numpy as np
    from flax import nnx

    from dsv4_jax.decode import make_manager

    batch, longest = len(sources), max(map(len, sources))
    rounded = -(-longest // width) * width
    manager = make_manager(model, batch, rounded, cache_dtype=cache_dtype, indexer_dtype=indexer_dtype)
    for _ in sources:
        manager.admit_request()
    ids = np.zeros((batch, rounded + 1), np.int32)
    slots = np.full((batch, rounded), -1, np.int32)
    for b, text in enumerate(sources):
        ids[b, : len(text)] = np.frombuffer(text, np.uint8)
        slots[b, : len(text) - 1] = b  # the last byte is only predicted
    graphdef, weights = nnx.split(model)
    step = make_step(graphdef)
    nats, start = 0.0, time.perf_counter()
    for first in range(0, rounded, width):
        part = np.s_[:, first : first + width]
        positions = np.broadcast_to(np.arange(first, first + width, dtype=np.int32), (batch, width))
        plan = manager.plan_step(slots[part].reshape(-1), positions.reshape(-1), num_segments=batch, width=width)
        following = ids[:, first + 1 : first + width + 1]
        losses, manager.cache = step(weights, manager.cache, plan, ids[part].reshape(-1), following.reshape(-1))
        nats += float(np.asarray(losses, np.float64)[slots[part].reshape(-1) >= 0].sum())
    return nats / math.log(2) / sum(len(text) - 1 for text in sources), time.perf_counter() - start


def load_released(checkpoint):
    """The model of the checkpoint after its weights went through the released form."""
    import dsv4_jax
    from dsv4_jax.model.files.released_form import quantise_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        quantise_checkpoint(checkpoint, folder)
        return dsv4_jax.from_pretrained(folder)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="scripts/bench quality", description=__doc__)
    parser.add_argument("--checkpoint", help="folder of a checkpoint whose tokens are bytes; default: the packaged one")
    parser.add_argument("--texts", type=int, default=16, help="texts, from different modules (default 16)")
    parser.add_argument("--shortest", type=int, default=512, help="bytes of the shortest (default 512)")
    parser.add_argument("--longest", type=int, default=1024, help="bytes of the longest (default 1024)")
    parser.add_argument("--width", type=int, default=128, help="tokens of each text in one step (default 128)")
    parser.add_argument("--formats", nargs="+", default=NAMES, choices=NAMES, help="default: all")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()

    import jax

    import dsv4_jax
    from dsv4_jax.cli import packaged_checkpoint

    checkpoint = options.checkpoint or packaged_checkpoint()
    model = dsv4_jax.from_pretrained(checkpoint)
    if model.config.vocab_size != 256:
        raise SystemExit(f"bench: the vocabulary has {model.config.vocab_size} tokens: expected 256, one for each byte")
    sources = texts.python_source(options.texts, options.shortest, options.longest)
    total = sum(map(len, sources))
    print(
        f"{len(sources)} texts of {options.shortest} to {options.longest} bytes ({total} in all) from Python "
        f"{platform.python_version()}'s standard library, JAX {jax.__version__} on {jax.devices()[0].device_kind}"
    )
    found = {}
    exact = None
    released = None
    for name in options.formats:
        if name.startswith(RELEASED) and released is None:
            released = load_released(checkpoint)
        weights = released if name.startswith(RELEASED) else model
        bits, seconds = score(weights, sources, options.width, *FORMATS[name.removeprefix(RELEASED)])
        exact = bits if name == "fp32" else exact
        found[name] = {"bits_per_byte": bits, "percent": None if exact is None else 100 * (bits / exact - 1)}
        difference = "" if exact is None else f"  {found[name]['percent']:+.3f} %"
        print(f"{name:24}  {bits:.5f} bits per byte{difference}   ({seconds:.0f} s)", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"bytes": total, "formats": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
