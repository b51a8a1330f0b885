"""Products with released weights on the GPU at the sizes of V4-Flash, beyond the shared suite (tests/ops/nn)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nn.experts import ExpertWeights, Fp4Weight, apply_experts
from dsv4_jax.ops.nn.projection import BlockScaledWeight, project_groups

pytestmark = pytest.mark.gpu
EXPERTS, HIDDEN, INNER, K = 8, 4096, 2048, 3


def weight(rng, rows, columns):
    return Fp4Weight(
        jnp.asarray(rng.integers(0, 256, (EXPERTS, rows, columns // 2), np.uint8)),
        jnp.asarray(rng.integers(117, 122, (EXPERTS, rows, columns // 32)).astype(np.uint8)),
    )


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_experts(rng):
    experts = ExpertWeights(weight(rng, INNER, HIDDEN), weight(rng, HIDDEN, INNER), weight(rng, INNER, HIDDEN))
    all_x = jnp.asarray(rng.normal(size=(600, HIDDEN)), jnp.bfloat16)
    all_picks = np.argsort(rng.random((600, EXPERTS - 1)))[:, :K].astype(np.int32) + 1  # nobody picks expert 0
    all_picks[1, 1], all_picks[5] = -1, [3, 3, 3]
    shares = jnp.asarray(rng.uniform(0.1, 1, (600, K)), jnp.float32)
    run = {
        name: jax.jit(lambda *a, n=name: apply_experts(*a, limit=10.0, implementation=n)) for name in ("jnp", "cuda")
    }
    unused = jax.tree.map(lambda w: w.at[0].set(0xFF), experts)
    for tokens in (1, 2, 9, 64, 600):
        x, picks, share = all_x[:tokens], jnp.asarray(all_picks[:tokens]), shares[:tokens]
        got = run["cuda"](x, picks, share, unused)
        assert error(got, run["jnp"](x.astype(jnp.float32), picks, share, experts)) < 2e-3, tokens
        other = run["cuda"](x.at[1:].set(jnp.nan), picks.at[1:].set(jnp.roll(picks[1:], 1, axis=0)), share, unused)
        np.testing.assert_array_equal(got[0].view(jnp.uint16), other[0].view(jnp.uint16))
        assert bool(jnp.isnan(other[1:]).all()), tokens


@pytest.mark.parametrize("picks", [[4, 2, 7, 1, 6, 3], [5], [-1, 4, 2, -1, EXPERTS, -1, 6], [-1, -1, 3, 3]])
def test_experts_of_one_token(picks, rng):
    """Its picks take the place of a list of who picked what; one that is none adds nothing."""
    experts = ExpertWeights(weight(rng, INNER, HIDDEN), weight(rng, HIDDEN, INNER), weight(rng, INNER, HIDDEN))
    x = jnp.asarray(rng.normal(size=(1, HIDDEN)), jnp.bfloat16)
    picks, share = jnp.asarray([picks], jnp.int32), jnp.asarray(rng.uniform(0.1, 1, (1, len(picks))), jnp.float32)
    unused = jax.tree.map(lambda w: w.at[0].set(0xFF), experts)
    got = apply_experts(x, picks, share, unused, limit=10.0, implementation="cuda")
    expected = apply_experts(x.astype(jnp.float32), picks, share, experts, limit=10.0, implementation="jnp")
    assert error(got, expected) < 2e-3
    # The same as in company, where there is such a list.
    two = [jnp.concatenate([a, a]) for a in (x, picks, share)]
    both = apply_experts(*two, unused, limit=10.0, implementation="cuda")
    assert error(got[0], both[0].astype(jnp.float32)) < 2e-3


@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 4096, 1024), (2, 2048, 4096), (1, 512, 8192)])
def test_projection(groups, rows, columns, rng):
    codes = rng.integers(0, 127, (rows, columns), np.uint8)
    scale = rng.integers(110, 125, (rows // 128, columns // 128)).astype(np.uint8)
    stored = BlockScaledWeight(jnp.asarray(codes), jnp.asarray(scale))
    for tokens in (1, 3, 8, 9, 32, 64, 65, 200):
        x = jnp.asarray(rng.normal(size=(tokens, groups, columns)), jnp.bfloat16)
        got = project_groups(x, stored, implementation="cuda")
        assert error(got, project_groups(x.astype(jnp.float32), stored, implementation="jnp")) < 2e-3, tokens
        other = project_groups(x.at[1:].set(jnp.nan), stored, implementation="cuda")
        np.testing.assert_array_equal(got[0].view(jnp.uint16), other[0].view(jnp.uint16))
