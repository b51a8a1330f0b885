"""Entries in the engines' record: the natively stored ones beside those of jax.numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_cases import CSA_UE8M0, HCA_UE8M0, apply_step, expected_entries, new_state, new_step, new_weights

from dsv4_jax.ops import dispatch
from dsv4_jax.ops.formats.record import Record, decode_record

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("g", [CSA_UE8M0, HCA_UE8M0], ids=["csa", "hca"])
def test_native_records_are_those_of_jax_numpy_but_for_rounding_boundaries(rng, g, platform):
    if platform not in dispatch.available():
        pytest.skip(f"no native library for {platform}")
    tokens = 3 * g.ratio if g.ratio == 128 else 80
    weights, before = new_weights(rng, g), new_state(rng, g, slots=3, columns=4)
    step = new_step(rng, g, np.zeros(3, int), [tokens] * 3, np.float32)
    ends = {}
    for name in ("jnp", platform):
        with jax.default_device(jax.devices("gpu" if name == "cuda" else "cpu")[0]):
            ends[name] = apply_step(g, before, step, weights, layer=1, implementation=name).stored
    entries = tokens // g.ratio
    row = [before.table[s, e // g.per_block] * g.per_block + e % g.per_block for s in range(3) for e in range(entries)]
    got, plain = (Record(*(x[1].reshape(-1, x.shape[-1])[row] for x in ends[name])) for name in (platform, "jnp"))
    assert (got.inv_scale[:, 7] == 0).all()
    assert np.count_nonzero(got.inv_scale != plain.inv_scale) <= 0.02 * got.inv_scale.size
    same = np.repeat(got.inv_scale[:, :7] == plain.inv_scale[:, :7], 64, axis=1)
    assert np.count_nonzero((got.nope != plain.nope) & same) <= 1e-3 * got.nope.size
    kv, gate = (
        [x[(step.slots == s)][np.argsort(step.positions[step.slots == s])] for s in range(3)]
        for x in (step.kv, step.gate)
    )
    exact = np.concatenate([expected_entries(g, weights, kv[s], gate[s]) for s in range(3)])
    values = np.asarray(decode_record(jax.tree.map(jnp.asarray, got)))
    finest = 2.0 ** (np.repeat(got.inv_scale[:, :7].astype(int), 64, axis=1) - 127) * 2.0**-10
    assert (np.abs(values - exact)[:, :448] <= np.maximum(np.abs(exact[:, :448]) * 2.0**-4, finest) * 1.001).all()
    # Nothing but those rows was written.
    others = np.setdiff1d(np.arange(ends[platform].nope[1].size // 448), row)
    assert (ends[platform].nope[1].reshape(-1, 448)[others] == 0xAA).all()
    assert (ends[platform].inv_scale[0] == 0xAA).all()
