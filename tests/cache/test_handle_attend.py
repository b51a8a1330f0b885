"""handle.attend: what a layer's own writes left, against the views of the same cache in float64."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import LayerCacheHandle, RawQuery
from dsv4_jax.ops.nn.rms_norm import rms_norm
from dsv4_jax.ops.nn.rope import apply_rope

TOLERANCE = 2e-5 if jax.default_backend() == "cpu" else 5e-3  # a GPU multiplies 16-bit factors
SWA, CSA, HCA = 0, 1, 2
KINDS = {SWA: (0, 0), CSA: (4, 2), HCA: (128, 1)}  # ratio, lanes
HEADS, LENGTH, WIDTH = 4, 150, 96


@partial(jax.jit, static_argnums=2, donate_argnums=0)
def step(cache, plan, layer, q, sink, kv, x, weights, selected):
    """What a model does: entries first, then the window before or after it is read. And the views, for the judge."""
    handle = LayerCacheHandle(cache.with_blocks(plan.new_blocks), plan, layer)
    if weights is not None:
        handle = handle.write_compressed(x, x, weights)
    fresh = None if plan.one_token_per_slot else kv
    handle = handle.write_swa(kv) if fresh is None else handle
    window = handle.read_swa_view(fresh)
    out = handle.attend(q, sink, selected=selected, fresh=fresh)
    handle = handle if fresh is None else handle.write_swa(kv, after=out)
    entries = None if weights is None else handle.read_classical_view(selected)
    return out, window, entries, handle.cache


def exact(q, sink, window, entries, plan):
    """Softmax of every token over what the views say it sees, float64."""
    out, row = np.zeros(q.shape), np.asarray(plan.segments.rows) // plan.segments.tokens.shape[1]
    for t in np.flatnonzero(np.asarray(plan.slots) >= 0):
        seen = [window.kv[row[t]][window.valid[t]]]
        if entries is not None:
            of_token = len(entries.kv) == len(q) and entries.kv.shape[1] == entries.valid.shape[1] == 9
            seen.append(entries.kv[t if of_token else row[t]][entries.valid[t]])
        seen = np.concatenate(seen).astype(np.float64)
        weights = np.exp(q[t].astype(np.float64) @ seen.T * 512**-0.5)
        out[t] = weights @ seen / (weights.sum(axis=-1) + np.exp(sink.astype(np.float64)))[:, None]
    return out


def feed(make, rng, weights, layer, cuts, *, selected=None, cache_dtype="fp8", slots=1):
    """Feeds LENGTH tokens to the last of `slots` slots, cut at `cuts` -> outputs (LENGTH, HEADS, 512)."""
    manager = make(cache_dtype=cache_dtype)
    slot = [manager.admit_request() for _ in range(slots)][-1]
    (ratio, lanes), rng = KINDS[layer], np.random.default_rng(9)
    q, kv, x = (rng.normal(size=(LENGTH, n)).astype(np.float32) for n in (HEADS * 512, 512, max(1, lanes) * 512))
    q, sink, w = q.reshape(LENGTH, HEADS, 512), np.float32([0, 1, -2, 3]), weights(ratio, 512, lanes) if ratio else None
    outputs = []
    for start, end in pairwise([0, *cuts, LENGTH]):
        n = end - start
        rows = np.resize(np.arange(start, end), 1 if n == 1 else WIDTH)
        live = np.arange(len(rows)) < n
        at = np.where(live, slot, -1)
        plan = manager.plan_step(at, rows, num_segments=1, width=len(rows))
        chosen = None if selected is None else selected[rows]
        out, window, entries, manager.cache = step(
            manager.cache, plan, layer, q[rows], sink, kv[rows], x[rows], w, chosen
        )
        views = (None if view is None else type(view)(*map(np.asarray, view)) for view in (window, entries))
        expected = exact(q[rows], sink, *views, plan)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
        assert not np.asarray(out)[~live].any()
        outputs.append(np.asarray(out)[live])
    return np.concatenate(outputs)


@pytest.mark.parametrize(
    ("layer", "chosen", "cache_dtype"),
    [(CSA, 0, "fp8"), (CSA, 9, "fp8_ue8m0"), (HCA, 0, "fp32")],
)
def test_chunks_cut_anywhere(make, rng, weights, layer, chosen, cache_dtype):
    """Every token gets the softmax over what the views show, and the same wherever its request is cut."""
    selected = None
    if chosen:
        selected = rng.integers(-1, (np.arange(LENGTH) // 4 + 3)[:, None], (LENGTH, chosen)).astype(np.int32)
    options = {"selected": selected, "cache_dtype": cache_dtype}
    a = feed(make, rng, weights, layer, (90,), **options)
    b = feed(make, rng, weights, layer, (1, 5, 100, 127, 128, 129), slots=2, **options)
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_raw_queries_are_normed_and_rotated_here(make, rng):
    manager = make()
    slots = [manager.admit_request(), manager.admit_request()]
    handle = jax.jit(LayerCacheHandle.write_swa)(
        manager.acquire(SWA, slots, [5, 9]), rng.normal(size=(2, 512)).astype(np.float32)
    )
    q, sink = rng.normal(size=(2, HEADS, 512)).astype(np.float32) * 3, np.zeros(HEADS, np.float32)
    angles = rng.uniform(0, 6, (2, 32))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    @jax.jit
    def both(handle, q, sink, cos, sin):
        turned = apply_rope(rms_norm(q, eps=1e-6), cos[:, None], sin[:, None])
        plain = apply_rope(handle.attend(turned, sink), cos[:, None], sin[:, None], inverse=True)
        return plain, handle.attend(q, sink, raw=RawQuery(cos, sin, 1e-6))

    plain, raw = both(handle, q, sink, cos, sin)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(raw, plain, rtol=0, atol=1e-5)


def test_errors_name_layer_and_shape(make, rng, weights):
    manager = make()
    slot = manager.admit_request()
    manager.allocate_block(CSA, slot)
    swa, csa = manager.acquire(SWA, [slot], [0]), manager.acquire(CSA, [slot], [0])
    many = manager.acquire(SWA, [slot] * 2, [0, 1])
    q, sink, angle = jnp.ones((1, HEADS, 512)), jnp.zeros(HEADS), jnp.ones((1, 32))
    for call, message in [
        (lambda: swa.attend(q[0], sink), r"layer 0: q has shape \(4, 512\), expected \(1, heads, 512\)"),
        (lambda: swa.attend(q.astype(jnp.float16), sink), "layer 0: q has dtype float16, expected float32 or bfloat16"),
        (lambda: swa.attend(q, sink[:3]), r"layer 0: sink has shape \(3,\), expected \(4,\)"),
        (
            lambda: swa.attend(q, sink, selected=jnp.zeros((1, 3), jnp.int32)),
            "layer 0 is SWA: it has no compressed ent",
        ),
        (
            lambda: csa.attend(q, sink, selected=jnp.zeros((1, 3))),
            "layer 1: selected has dtype float32, expected int32",
        ),
        (lambda: csa.attend(q, sink, fresh=q[0]), r"layer 1: fresh has shape \(4, 512\), expected \(1, 512\)"),
        (lambda: csa.attend(q, sink, raw=(angle, angle, 1e-6)), "layer 1: raw is a tuple, expected a RawQuery"),
        (
            lambda: csa.attend(q, sink, raw=RawQuery(angle[:, 1:], angle, 1e-6)),
            r"raw.cos has shape \(1, 31\), expected",
        ),
        (
            lambda: csa.attend(q, sink, raw=RawQuery(angle, angle, sink[0])),
            "layer 1: raw.eps is a .*, expected a Python",
        ),
        (lambda: csa.attend(q, sink, scale="1"), "layer 1: scale is a str, expected a Python float"),
        (lambda: jax.jit(lambda x: csa.attend(q, sink, scale=x))(0.1), "layer 1: scale is a .*Tracer, expected a Pyth"),
        (
            lambda: many.attend(jnp.ones((2, HEADS, 512)), sink),
            r"layer 0: attend got several tokens of a slot without fresh, expected their kv: attend first",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
