"""The head's read of the residual streams (arXiv 2606.19348, section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..ops.nn.hyper_connect import Mixing, Update, hyper_read
from .config import DSV4Config

Array = jax.Array


class HyperHead(nnx.Module):
    """Reads the final streams into one vector."""

    def __init__(self, config: DSV4Config, *, rngs: nnx.Rngs):
        n, d = config.hc_mult, config.hidden_size
        self.hc_fn = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (n, n * d), jnp.float32))
        self.hc_base = nnx.Param(jnp.zeros((n,), jnp.float32))
        self.hc_scale = nnx.Param(jnp.ones((1,), jnp.float32))
        self.rms_eps, self.hc_eps = config.rms_norm_eps, config.hc_eps

    @jax.named_scope("streams")
    def __call__(self, streams: Array, update: Update | None, norm: Array) -> Array:
        """streams (T, n, d) before the last update, norm (d,), a weight -> normed (T, d)."""
        mixing = Mixing(self.hc_fn[...], self.hc_base[...], self.hc_scale[...])
        return hyper_read(streams, update, mixing, norm, hc_eps=self.hc_eps, rms_eps=self.rms_eps)
