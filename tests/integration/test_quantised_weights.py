"""What the formats of the released checkpoints cost: the trained model quantised, against transformers' logits."""

import numpy as np
from stepper import Stepper

import dsv4_jax
from dsv4_jax import cli
from dsv4_jax.model.files.released_form import quantise_checkpoint


def bits_per_byte(logits, ids):
    """Of ids[1:], each predicted from those before it."""
    logits = logits[:-1].astype(np.float64)
    nats = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return float((nats - logits[np.arange(len(ids) - 1), ids[1:]]).mean() / np.log(2))


def test_weights_in_the_released_form_cost_what_their_formats_allow(data, tmp_path):
    """FP8 weights and FP4 experts, converted and loaded: the logits, and bits per byte of the text."""
    with np.load(data / "goldens" / "tiny_dsv4_topk512.npz") as file:
        ids, exact = file["full_ids"].tolist(), file["full_logits"]
    quantise_checkpoint(cli.packaged_checkpoint(), tmp_path / "released", shard_bytes=2_000_000)

    def logits_of(**how):
        stepper = Stepper(dsv4_jax.from_pretrained(tmp_path / "released", index_topk=512, **how), 1)
        stepper.manager.admit_request()
        return stepper.feed(0, ids, (), width=128)

    logits, converted = logits_of(), logits_of(weights="float32")
    error, before, after = np.abs(logits - exact).mean(), bits_per_byte(exact, ids), bits_per_byte(logits, ids)
    # Held as stored or converted first, the weights are the same numbers.
    assert abs(after - bits_per_byte(converted, ids)) < 1e-4
    np.testing.assert_allclose(logits, converted, atol=0.02)
    print(f"bits per byte {before:.4f} -> {after:.4f}, logits differ by {error:.3f} on average")
    assert 0.01 < error < 0.6  # measured: 0.421
    assert abs(after / before - 1) < 0.05  # measured: +1.97 %
