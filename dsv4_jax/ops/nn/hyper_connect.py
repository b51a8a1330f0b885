"""Manifold-constrained hyper-connections: the residual is several streams (arXiv 2606.19348, section 2.2)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import dispatch
from .rms_norm import rms_norm
from .sinkhorn import sinkhorn

Array = jax.Array

CUDA_STREAMS = 4
"""Streams that the CUDA form takes."""

COLUMNS = range(3584, 7168 + 1, 512)
"""Widths of a stream that the CUDA form takes."""


class Update(NamedTuple):
    """What a part of a layer gives back to the streams, not yet written there.

    Attributes:
      output: (T, d), in the dtype of the streams.
      post: (T, n) float32, how much of it each stream takes.
      comb: (T, n, n) float32, [j, k]: how much of stream j goes to stream k.
      extra: added to the output first, in its dtype; or None.
    """

    output: Array
    post: Array
    comb: Array
    extra: Array | None = None


class Mixing(NamedTuple):
    """The weights that a token's coefficients come from, float32.

    Attributes:
      fn: ((2 + n) n, n d), rows for what is read, for post and for comb; of the head (n, n d).
      base: ((2 + n) n,), of the head (n,).
      scale: (3,), of the head (1,).
    """

    fn: Array
    base: Array
    scale: Array


def merge(streams: Array, update: Update | None) -> Array:
    """The streams (T, n, d) after an update: stream k is post_k * output + sum over j of comb[j, k] * stream_j."""
    if update is None:
        return streams
    old = streams.astype(jnp.float32)
    output = update.output if update.extra is None else update.output + update.extra
    mixed = jnp.sum(update.comb[..., None] * old[:, :, None], axis=1)
    return (update.post[..., None] * output.astype(jnp.float32)[:, None] + mixed).astype(streams.dtype)


def hyper_connect(
    streams: Array,
    update: Update | None,
    mixing: Mixing,
    norm: Array,
    *,
    iterations: int,
    hc_eps: float,
    rms_eps: float,
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Writes an update to the streams and reads from them what the next part of the layer takes.

    The coefficients are products of `fn` with a token's streams, normed together: sigmoids of what is read and written,
    and comb, which softmax and Sinkhorn make nearly doubly stochastic. Everything is float32 inside; the streams and
    what is read are rounded to their dtype before they are used further.

    Args:
      streams: (T, n, d) float32 | bfloat16.
      update: of the part before, None where there is none.
      mixing: weights of the coefficients.
      norm: (d,) float32, weight of the RMS norm of what is read.
      iterations: of Sinkhorn.
      hc_eps: added to what is read, to comb and in Sinkhorn's divisions.
      rms_eps: of both RMS norms.
      implementation: "jnp" or "cuda"; None takes the native one where it serves.

    Returns:
      The streams after the update (T, n, d); the input of the next part, normed (T, d); post (T, n) and comb (T, n, n)
      for its update.

    Raises:
      ValueError: an implementation that cannot be used.
    """

    def in_jnp(streams: Array, update: Update | None, mixing: Mixing, norm: Array) -> tuple[Array, ...]:
        streams, n = merge(streams, update), streams.shape[1]
        mix, scale, base = _project(streams, mixing.fn, rms_eps), mixing.scale, mixing.base[None]
        pre = jax.nn.sigmoid(mix[:, :n] * scale[0] + base[:, :n]) + hc_eps
        post = 2.0 * jax.nn.sigmoid(mix[:, n : 2 * n] * scale[1] + base[:, n : 2 * n])
        comb = (mix[:, 2 * n :] * scale[2] + base[:, 2 * n :]).reshape(-1, n, n)
        comb = sinkhorn(jax.nn.softmax(comb, axis=-1) + hc_eps, iterations=iterations, eps=hc_eps)
        return streams, rms_norm(_read(streams, pre), norm, eps=rms_eps), post, comb

    def in_native(streams: Array, update: Update | None, mixing: Mixing, norm: Array) -> tuple[Array, ...]:
        (tokens, n, d), f32 = streams.shape, jnp.float32
        results: list[Any] = [((tokens, d), streams.dtype), ((tokens, n), f32), ((tokens, n, n), f32)]
        results = results if update is None else [(streams.shape, streams.dtype), *results]
        got = _call(
            results,
            streams,
            update,
            mixing,
            norm,
            head=0,
            iterations=iterations,
            hc_eps=hc_eps,
            rms_eps=rms_eps,
        )
        return tuple(got) if update is not None else (streams, *got)

    limit = _native_limit(streams)
    return dispatch.call("hyper_connect", implementation, limit, in_native, in_jnp, streams, update, mixing, norm)


def hyper_read(
    streams: Array,
    update: Update | None,
    mixing: Mixing,
    norm: Array,
    *,
    hc_eps: float,
    rms_eps: float,
    implementation: str | None = None,
) -> Array:
    """What the head takes from the streams after an update, normed (T, d); as `hyper_connect`, nothing is written back.

    Args:
      streams, update, norm, hc_eps, rms_eps, implementation: as in `hyper_connect`.
      mixing: weights of the coefficients, with n rows.

    Returns:
      (T, d), in the dtype of the streams.

    Raises:
      ValueError: an implementation that cannot be used.
    """

    def in_jnp(streams: Array, update: Update | None, mixing: Mixing, norm: Array) -> Array:
        streams = merge(streams, update)
        mix = _project(streams, mixing.fn, rms_eps)
        pre = jax.nn.sigmoid(mix * mixing.scale[None] + mixing.base[None]) + hc_eps
        return rms_norm(_read(streams, pre), norm, eps=rms_eps)

    def in_native(streams: Array, update: Update | None, mixing: Mixing, norm: Array) -> Array:
        results: list[Any] = [((streams.shape[0], streams.shape[2]), streams.dtype)]
        results = results if update is None else [(streams.shape, streams.dtype), *results]
        return _call(results, streams, update, mixing, norm, head=1, iterations=0, hc_eps=hc_eps, rms_eps=rms_eps)[-1]

    limit = _native_limit(streams)
    return dispatch.call("hyper_read", implementation, limit, in_native, in_jnp, streams, update, mixing, norm)


def _project(streams: Array, fn: Array, eps: float) -> Array:
    flat = rms_norm(streams.astype(jnp.float32).reshape(streams.shape[0], -1), eps=eps)
    return jnp.einsum("tf,of->to", flat, fn, precision=jax.lax.Precision.HIGHEST)


def _read(streams: Array, pre: Array) -> Array:
    return jnp.sum(pre[..., None] * streams.astype(jnp.float32), axis=1).astype(streams.dtype)


def _call(
    results: list[Any],
    streams: Array,
    update: Update | None,
    mixing: Mixing,
    norm: Array,
    head: int,
    iterations: int,
    hc_eps: float,
    rms_eps: float,
) -> Sequence[Array]:
    call: Any = dispatch.ffi_call("dsv4_hyper_connect", tuple(jax.ShapeDtypeStruct(*result) for result in results))
    return call(
        *jax.tree.leaves((streams, update, mixing, norm)),
        update_parts=np.int64(len(jax.tree.leaves(update))), head=np.int64(head), iterations=np.int64(iterations),
        hc_eps=np.float32(hc_eps), rms_eps=np.float32(rms_eps),
    )  # fmt: skip


def _native_limit(streams: Array) -> Any:
    """What keeps the native form from serving: limit(platform)."""
    n, d = streams.shape[1:]

    def limit(platform: str) -> str | None:
        if platform == "cpu":
            return "there is none for the CPU"
        if not dispatch.on_hopper():
            return "it is for GPUs of compute capability 9.0"
        if streams.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {streams.dtype}"
        if not streams.shape[0]:
            return "it takes a token or more"
        if n != CUDA_STREAMS or d not in COLUMNS:
            return f"it takes 4 streams of a multiple of 512 values from 3584 to 7168, not {n} of {d}"
        return None

    return limit
