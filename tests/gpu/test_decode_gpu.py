"""The packaged checkpoint on the GPU, its cache written by the CUDA kernels, against the same on the CPU."""

from pathlib import Path

import jax
import numpy as np
import pytest

import dsv4_jax

pytestmark = pytest.mark.gpu
TINY = Path(dsv4_jax.__file__).parent / "data" / "tiny_dsv4"


def decode(device, prompts):
    with jax.default_device(device):
        model = dsv4_jax.from_pretrained(TINY)
        return dsv4_jax.generate(model, prompts, 12, return_logits=True)


def test_the_default_cache_gives_the_same_text():
    text = Path(__file__).read_bytes()
    prompts = [list(text[:131]), list(text[:300]), list(text[40:45])]
    _, there = decode(jax.devices("gpu")[0], prompts)
    _, here = decode(jax.devices("cpu")[0], prompts)
    for b, (ours, theirs) in enumerate(zip(there, here, strict=True)):
        difference = np.abs(ours[0] - theirs[0])
        print(f"prompt {b}: first logits differ by {np.median(difference):.2e} (median), {difference.max():.2e} (most)")
        # Rounding alone: a stored code on a boundary may fall either way.
        assert np.median(difference) < 0.02


def test_every_gpu_gives_the_same():
    """What a kernel is given before it starts is given on each device: one process may use several."""
    first, *others = jax.devices("gpu")
    if not others:
        pytest.skip("one GPU")
    prompts = [list(Path(__file__).read_bytes()[:300])]
    texts, logits = decode(first, prompts)
    for device in others:
        there, its_logits = decode(device, prompts)
        assert there == texts
        np.testing.assert_array_equal(its_logits[0], logits[0])
