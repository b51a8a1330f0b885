"""The cache in an attention of one's own, in plain JAX: an HCA layer, 128 tokens and an entry for every 128."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import CompressorWeights, DSV4Config, KVCacheManager, LayerCacheHandle

HIDDEN, HEADS, DIM, LAYER = 64, 4, 512, 1
CONFIG = DSV4Config.flash().replace(num_hidden_layers=2, compress_ratios=(0, 128), num_hash_layers=0)


def make_weights(seed: int = 0) -> dict[str, jax.Array]:
    """Random projections: hidden -> queries, window KV, compressor KV and gate; heads -> hidden."""
    shapes = {"q": (HIDDEN, HEADS * DIM), "kv": (HIDDEN, DIM), "ckv": (HIDDEN, DIM), "cgate": (HIDDEN, DIM)}
    keys = jax.random.split(jax.random.key(seed), 5)
    weights = {n: jax.random.normal(k, s) * HIDDEN**-0.5 for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    return weights | {"out": jax.random.normal(keys[4], (HEADS * DIM, HIDDEN)) * (HEADS * DIM) ** -0.5}


def attention(w, cache, plan, x):
    """x (T, HIDDEN), one token of every running request -> its output (T, HIDDEN), and the cache."""
    compressor = CompressorWeights(ape=jnp.zeros((128, DIM)), norm=jnp.ones(DIM), inv_freq=jnp.zeros(32))
    handle = LayerCacheHandle(cache, plan, LAYER)  # a view: it allocates nothing
    handle = handle.write_swa(x @ w["kv"]).write_compressed(x @ w["ckv"], x @ w["cgate"], compressor)
    window, entries = handle.read_swa_view(), handle.read_classical_view()
    kv = jnp.concatenate([window.kv, entries.kv], axis=1)  # (T, N, DIM): keys are values
    valid = jnp.concatenate([window.valid, entries.valid], axis=1)  # (T, N)
    scores = jnp.einsum("thd,tnd->thn", (x @ w["q"]).reshape(-1, HEADS, DIM), kv) * DIM**-0.5
    weights = jax.nn.softmax(jnp.where(valid[:, None], scores, -jnp.inf))
    out = jnp.einsum("thn,tnd->thd", weights, kv).reshape(-1, HEADS * DIM) @ w["out"]
    return out, handle.cache


def decode(x: np.ndarray, cache_dtype: str = "fp8") -> tuple[np.ndarray, KVCacheManager]:
    """Feeds x (requests, tokens, HIDDEN) token by token -> outputs of the same shape, and the manager."""
    manager = KVCacheManager.from_memory(
        CONFIG, 64 << 20, max_concurrent_requests=len(x), max_context_len=512, cache_dtype=cache_dtype
    )
    slots = [manager.admit_request() for _ in x]
    step = jax.jit(attention, donate_argnums=1)  # the cache is donated: it is updated in place
    weights, outputs = make_weights(), []
    for position in range(x.shape[1]):
        plan = manager.plan_step(slots, [position] * len(x))  # gives out blocks when entries need them
        out, manager.cache = step(weights, manager.cache, plan, x[:, position])
        outputs.append(out)
    return np.stack(outputs, axis=1), manager


if __name__ == "__main__":
    tokens = np.random.default_rng(0).normal(size=(2, 260, HIDDEN)).astype(np.float32)
    outputs, manager = decode(tokens)
    blocks = [manager.blocks(slot)["hca"] for slot in range(len(tokens))]
    print(f"outputs {outputs.shape}; the requests own the HCA blocks {blocks[0]} and {blocks[1]}")
