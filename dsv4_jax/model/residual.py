"""Manifold-constrained hyper-connections: the residual is several streams (arXiv 2606.19348, section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..ops.nn.rms_norm import rms_norm
from ..ops.nn.sinkhorn import sinkhorn
from .config import DSV4Config

Array = jax.Array


@jax.named_scope("streams")
def _project(streams: Array, fn: Array, eps: float) -> Array:
    flat = rms_norm(streams.astype(jnp.float32).reshape(streams.shape[0], -1), eps=eps)
    return jnp.einsum("tf,of->to", flat, fn, precision=jax.lax.Precision.HIGHEST)


@jax.named_scope("streams")
def connect(
    streams: Array, fn: Array, base: Array, scale: Array, *, iterations: int, hc_eps: float, rms_eps: float
) -> tuple[Array, Array, Array]:
    """What a block reads from the streams and how it is written back.

    streams (T, n, d); fn ((2 + n) n, n d), base ((2 + n) n,), scale (3,) float32. Returns the block's input (T, d),
    post (T, n) and comb (T, n, n) float32.
    """
    n = streams.shape[1]
    mix = _project(streams, fn, rms_eps)
    base = base[None]
    pre = jax.nn.sigmoid(mix[:, :n] * scale[0] + base[:, :n]) + hc_eps
    post = 2.0 * jax.nn.sigmoid(mix[:, n : 2 * n] * scale[1] + base[:, n : 2 * n])
    comb = (mix[:, 2 * n :] * scale[2] + base[:, 2 * n :]).reshape(-1, n, n)
    comb = sinkhorn(jax.nn.softmax(comb, axis=-1) + hc_eps, iterations=iterations, eps=hc_eps)
    read = jnp.sum(pre[..., None] * streams.astype(jnp.float32), axis=1)
    return read.astype(streams.dtype), post, comb


@jax.named_scope("streams")
def merge(streams: Array, output: Array, post: Array, comb: Array) -> Array:
    """New stream k = post_k * output + sum over j of comb[j, k] * stream_j; shapes as in `connect`."""
    old = streams.astype(jnp.float32)
    mixed = jnp.sum(comb[..., None] * old[:, :, None], axis=1)
    return (post[..., None] * output.astype(jnp.float32)[:, None] + mixed).astype(streams.dtype)


class HyperHead(nnx.Module):
    """Reads the final streams into one vector."""

    def __init__(self, config: DSV4Config, *, rngs: nnx.Rngs):
        n, d = config.hc_mult, config.hidden_size
        self.hc_fn = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (n, n * d), jnp.float32))
        self.hc_base = nnx.Param(jnp.zeros((n,), jnp.float32))
        self.hc_scale = nnx.Param(jnp.ones((1,), jnp.float32))
        self.rms_eps, self.hc_eps = config.rms_norm_eps, config.hc_eps

    @jax.named_scope("streams")
    def __call__(self, streams: Array) -> Array:
        """streams (T, n, d) -> (T, d)."""
        mix = _project(streams, self.hc_fn[...], self.rms_eps)
        pre = jax.nn.sigmoid(mix * self.hc_scale[...][None] + self.hc_base[...][None]) + self.hc_eps
        return jnp.sum(pre[..., None] * streams.astype(jnp.float32), axis=1).astype(streams.dtype)
