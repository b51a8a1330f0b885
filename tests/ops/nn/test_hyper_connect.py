"""Every form of the hyper-connections against the rule in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.hyper_connect import Mixing, Update, hyper_connect, hyper_read

EPS = {"hc_eps": 1e-6, "rms_eps": 1e-5}


def inputs(rng, tokens, dim, streams=4, *, head=False, dtype="float32"):
    rows = streams if head else streams * (2 + streams)
    mixing = Mixing(
        rng.normal(size=(rows, streams * dim)) * (streams * dim) ** -0.5, rng.normal(size=rows),
        rng.uniform(0.5, 1.5, 1 if head else 3),
    )  # fmt: skip
    update = Update(
        rng.normal(size=(tokens, dim)), rng.uniform(0, 2, (tokens, streams)),
        rng.uniform(0, 0.5, (tokens, streams, streams)), rng.normal(size=(tokens, dim)),
    )  # fmt: skip
    mixing, update = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (mixing, update))
    old = jnp.asarray(rng.normal(size=(tokens, streams, dim)), dtype)
    return (
        old,
        update._replace(output=update.output.astype(dtype), extra=update.extra.astype(dtype)),
        mixing,
        jnp.asarray(rng.normal(size=dim), "float32"),
    )


def expected(old, update, mixing, norm, *, iterations=20, head=False):
    """float64, with the streams and what is read rounded as they are stored."""
    dtype, n = old.dtype, old.shape[1]

    def wide(x):
        return np.asarray(x, np.float64)

    def rms(x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS["rms_eps"])

    new = wide(old)
    if update is not None:
        output, post, comb = map(wide, update[:3])
        if update.extra is not None:
            output = wide((update.output + update.extra).astype(dtype))
        new = wide((post[..., None] * output[:, None] + np.einsum("tjk,tjd->tkd", comb, new)).astype(dtype))
    fn, base, scale = map(wide, mixing)
    mix = rms(new.reshape(len(new), -1)) @ fn.T
    pre = 1 / (1 + np.exp(-mix[:, :n] * scale[0] - base[:n])) + EPS["hc_eps"]
    x = rms(wide(np.einsum("tj,tjd->td", pre, new).astype(dtype))) * wide(norm)
    if head:
        return (x,)
    post = 2 / (1 + np.exp(-mix[:, n : 2 * n] * scale[1] - base[n : 2 * n]))
    comb = np.exp(mix[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
    comb = comb / comb.sum(axis=2, keepdims=True) + EPS["hc_eps"]
    for i in range(iterations):
        if i:
            comb = comb / (comb.sum(axis=2, keepdims=True) + EPS["hc_eps"])
        comb = comb / (comb.sum(axis=1, keepdims=True) + EPS["hc_eps"])
    return new, x, post, comb


def close(got, wanted, tolerance):
    got = np.asarray(got, np.float64)
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("first", [True, False])
def test_rule(first, rng):
    old, update, mixing, norm = inputs(rng, 3, 16)
    update = None if first else update
    got = jax.jit(lambda *a: hyper_connect(*a, iterations=20, **EPS))(old, update, mixing, norm)
    for part, wanted in zip(got, expected(old, update, mixing, norm), strict=True):
        close(part, wanted, 1e-5)


def test_what_the_head_reads(rng):
    old, update, mixing, norm = inputs(rng, 3, 16, head=True)
    close(hyper_read(old, update, mixing, norm, **EPS), expected(old, update, mixing, norm, head=True)[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dim"), [(1, 4096), (3, 3584), (13, 4096), (64, 4096), (70, 7168), (517, 4096), (530, 7168)]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_rule_on_a_gpu(tokens, dim, first, head, rng):
    old, update, mixing, norm = inputs(rng, tokens, dim, head=head, dtype="bfloat16")
    update = None if first else update
    if head:
        got = (jax.jit(lambda *a: hyper_read(*a, **EPS, implementation="cuda"))(old, update, mixing, norm),)
    else:
        run = jax.jit(lambda *a: hyper_connect(*a, iterations=20, **EPS, implementation="cuda"))
        got = run(old, update, mixing, norm)
    wanted = expected(old, update, mixing, norm, head=head)
    if update is not None and not head:  # a stream's value may be rounded the other way, and the rest follows from it
        wanted = (wanted[0], *expected(got[0], None, mixing, norm)[1:])
    # bfloat16 rounds to 1.7e-3; a value that falls on the other side of a tie does so by more.
    for part, of_rule in zip(got, wanted, strict=True):
        close(part, of_rule, 3e-3 if part.dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 600])
def test_a_token_does_not_depend_on_its_company_on_a_gpu(tokens, rng):
    old, update, mixing, norm = inputs(rng, tokens, 4096, dtype="bfloat16")
    order = jnp.asarray(rng.permutation(tokens))
    run = jax.jit(lambda *a: hyper_connect(*a, iterations=20, **EPS, implementation="cuda"))
    got = run(old, update, mixing, norm)
    for part, moved in zip(got, run(old[order], Update(*(x[order] for x in update)), mixing, norm), strict=True):
        np.testing.assert_array_equal(np.asarray(part[order], np.float32), np.asarray(moved, np.float32))


def test_what_the_native_form_does_not_take(rng):
    old, update, mixing, norm = inputs(rng, 3, 16)
    for implementation in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"implementation '{implementation}' cannot be used"):
            hyper_connect(old, update, mixing, norm, iterations=20, **EPS, implementation=implementation)
