"""The cache in a Flax (nnx) model of one's own: a window, a CSA and an HCA layer, decoded greedily."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax import CompressorWeights, DSV4Config, KVCacheManager, LayerCacheHandle, hadamard

# What the cache needs to know of the model: layers, widths of records and indexer keys, and the longest context.
CONFIG = DSV4Config.flash().replace(
    num_hidden_layers=3, compress_ratios=(0, 4, 128), head_dim=128, max_position_embeddings=512
)
VOCAB, HIDDEN, HEADS, TOP_K = 256, 64, 2, 8


class Compressor(nnx.Module):
    """Projections of what is compressed; the cache pools windows of `ratio` tokens into entries."""

    def __init__(self, ratio: int, dim: int, lanes: int, rngs: nnx.Rngs):
        self.kv = nnx.Linear(HIDDEN, lanes * dim, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(HIDDEN, lanes * dim, use_bias=False, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(dim))
        self.ape = nnx.Param(jnp.zeros((ratio, lanes * dim)))

    def __call__(self, write, x: jax.Array) -> LayerCacheHandle:
        """write: the handle's method that stores the entries."""
        weights = CompressorWeights(self.ape[...], self.norm[...], jnp.ones(CONFIG.rope_dim // 2))
        return write(self.kv(x), self.gate(x), weights)


class Attention(nnx.Module):
    """Attention over the window and, by the layer's ratio, all (HCA) or the best TOP_K (CSA) of its entries."""

    def __init__(self, ratio: int, rngs: nnx.Rngs):
        dim, self.overlap = CONFIG.head_dim, ratio == CONFIG.csa_ratio
        self.q = nnx.Linear(HIDDEN, HEADS * dim, use_bias=False, rngs=rngs)
        self.kv = nnx.Linear(HIDDEN, dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(HEADS * dim, HIDDEN, use_bias=False, rngs=rngs)
        self.sink = nnx.Param(jnp.zeros(HEADS))
        if ratio:
            self.compressor = Compressor(ratio, dim, 1 + self.overlap, rngs)
        if self.overlap:
            self.index_q = nnx.Linear(HIDDEN, CONFIG.index_head_dim, use_bias=False, rngs=rngs)
            self.index_keys = Compressor(ratio, CONFIG.index_head_dim, 2, rngs)

    def __call__(self, x: jax.Array, handle: LayerCacheHandle) -> tuple[jax.Array, LayerCacheHandle]:
        """x (T, HIDDEN), one token of every request."""
        handle, chosen = handle.write_swa(self.kv(x)), None
        if self.overlap:
            handle = self.index_keys(handle.write_indexer, x)
            keys = handle.read_indexer_view()
            q = hadamard(self.index_q(x)) if handle.keys_rotated else self.index_q(x)
            scores = jnp.where(keys.valid, jnp.einsum("td,ted->te", q, keys.keys), -jnp.inf)
            best, chosen = jax.lax.top_k(scores, TOP_K)
            chosen = jnp.where(jnp.isfinite(best), chosen, -1)
        if hasattr(self, "compressor"):
            handle = self.compressor(handle.write_compressed, x)
        q = self.q(x).reshape(-1, HEADS, CONFIG.head_dim)
        out = handle.attend(q, self.sink[...], selected=chosen)
        return self.out(out.reshape(len(x), -1)), handle


class Model(nnx.Module):
    """Embedding, attention layers with residuals, head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.layers = nnx.List([Attention(ratio, rngs) for ratio in CONFIG.compress_ratios])
        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array, cache, plan):
        """tokens (T,) -> logits (T, VOCAB), cache."""
        cache, x = cache.with_blocks(plan.new_blocks), self.embed(tokens)
        for i, layer in enumerate(self.layers):
            out, handle = layer(x, LayerCacheHandle(cache, plan, i))
            cache, x = handle.cache, x + out
        return self.head(self.norm(x)), cache


def make_step(model: Model):
    """The jitted step: (weights, cache, plan, tokens (T,)) -> next tokens (T,), cache; the cache is donated."""
    graphdef = nnx.split(model)[0]

    @partial(jax.jit, donate_argnums=1)
    def step(weights, cache, plan, tokens):
        logits, cache = nnx.merge(graphdef, weights)(tokens, cache, plan)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return step


def generate(model: Model, step, prompts: list[list[int]], length: int) -> tuple[list[list[int]], KVCacheManager]:
    """Continues prompts, every one to `length` tokens; a prompt is fed token by token."""
    manager = KVCacheManager.from_memory(CONFIG, 32 << 20, max_concurrent_requests=len(prompts))
    slots = [manager.admit_request() for _ in prompts]
    texts, weights = [list(prompt) for prompt in prompts], nnx.state(model)
    for position in range(length - 1):
        plan = manager.plan_step(slots, [position] * len(slots))
        tokens = jnp.asarray([text[position] for text in texts], jnp.int32)
        chosen, manager.cache = step(weights, manager.cache, plan, tokens)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            if len(text) == position + 1:
                text.append(token)
    return texts, manager


if __name__ == "__main__":
    model = Model(nnx.Rngs(0))
    for text in generate(model, make_step(model), [[1, 2, 3], [7]], 150)[0]:
        print(text[:12], "…", text[-4:])
