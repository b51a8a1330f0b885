"""The loop: options, stopping, sampling, errors, and that it compiles once."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from loops import programs_compiled

import dsv4_jax
from dsv4_jax.model.transformer import DSV4Model

SHARP = Path(__file__).parents[1] / "data" / "sharp_dsv4"
CONFIG = dsv4_jax.DSV4Config.from_hf(SHARP).replace(
    num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, index_topk=8
)
PROMPTS = [list(range(3, 60)), [5], list(range(100, 130))]


@pytest.fixture(scope="module")
def model():
    """A small random model; the head is made louder, so that sampling has something to choose from."""
    model = DSV4Model(CONFIG, rngs=nnx.Rngs(1))
    model.head.weight[...] = model.head.weight[...] * 4
    return model


def test_shapes(model):
    tokens, logits = dsv4_jax.generate(model, PROMPTS, 5, return_logits=True)
    assert [len(t) for t in tokens] == [5, 5, 5]
    assert all(isinstance(t, int) for row in tokens for t in row)
    assert [x.shape for x in logits] == [(5, CONFIG.vocab_size)] * 3
    assert all(x.dtype == np.float32 for x in logits)
    assert [[int(i) for i in x.argmax(-1)] for x in logits] == tokens
    assert dsv4_jax.generate(model, iter(PROMPTS), np.int64(5)) == tokens


def test_nothing_to_do(model):
    assert dsv4_jax.generate(model, [], 5) == []
    assert dsv4_jax.generate(model, PROMPTS, 0) == [[], [], []]
    tokens, logits = dsv4_jax.generate(model, PROMPTS[:1], 0, return_logits=True)
    assert (tokens, logits[0].shape) == ([[]], (0, CONFIG.vocab_size))


def test_stop_tokens(model):
    tokens = dsv4_jax.generate(model, PROMPTS, 20)
    stop = tokens[0][3]
    stopped = dsv4_jax.generate(model, PROMPTS, 20, stop_tokens=[stop])
    for row, short in zip(tokens, stopped, strict=True):
        assert short == (row[: row.index(stop) + 1] if stop in row else row)
    first = dsv4_jax.generate(model, PROMPTS, 20, stop_tokens=[tokens[1][0]])
    assert first[1] == tokens[1][:1]


def test_sampling_follows_from_the_seed(model):
    a = dsv4_jax.generate(model, PROMPTS, 12, temperature=1.0, seed=3)
    assert a == dsv4_jax.generate(model, PROMPTS, 12, temperature=1.0, seed=3)
    assert a != dsv4_jax.generate(model, PROMPTS, 12, temperature=1.0, seed=4)
    best = dsv4_jax.generate(model, PROMPTS, 12)
    for cold in (1e-4, 2e-38):  # a logit divided by the second is beyond float32
        assert dsv4_jax.generate(model, PROMPTS, 12, temperature=cold, seed=3) == best


def test_compiled_once(model, monkeypatch):
    """Calls of similar sizes, whatever the prompts and their lengths, share the compiled programs."""
    dsv4_jax.generate(model, PROMPTS, 20)
    before = programs_compiled(model)
    assert min(before) > 0
    dsv4_jax.generate(model, [p[::-1] for p in PROMPTS], 30)
    dsv4_jax.generate(model, [[1], [2, 3], list(range(40))], 18)
    assert programs_compiled(model) == before


def test_bfloat16_model(model):
    half = DSV4Model(CONFIG, dtype=jax.numpy.bfloat16, rngs=nnx.Rngs(1))
    tokens, logits = dsv4_jax.generate(half, PROMPTS, 3, return_logits=True)
    assert [len(t) for t in tokens] == [3, 3, 3]
    assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompt 1 is '\[\]': expected a list of one or more token ids"),
        ([[0.5]], {}, "prompt 0"),
        ([["a"]], {}, "prompt 0"),
        ([[1, 192]], {}, "token ids from 1 to 192: expected 0 to 191"),
        ([[-1]], {}, "token ids from -1 to -1"),
        (None, {}, "prompts is 'None': expected a list of prompts"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens is 1.5: expected an integer"),
        ([[1]], {"temperature": "1"}, "temperature is '1'"),
        ([[1]], {"num_samples": 1.5}, "num_samples is 1.5: expected an integer"),
        ([[1]], {"draft_tokens": 1.5}, "draft_tokens is 1.5: expected an integer"),
        ([[1]], {"max_new_tokens": 9000}, "the model has 8192 positions"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"cache_dtype": "fp7"}, "cache_dtype 'fp7' is not known"),
        ([[1]], {"indexer_dtype": "fp7"}, "indexer_dtype 'fp7' is not known"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"stop_tokens": [192]}, r"stop_tokens are \[192\]"),
        ([[1]], {"stop_tokens": None}, "stop_tokens are None: expected a list"),
    ],
)
def test_bad_input(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        dsv4_jax.generate(model, prompts, **{"max_new_tokens": 4, **options})
    with pytest.raises(ValueError, match=message):
        dsv4_jax.stream(model, prompts, **{"max_new_tokens": 4, **options})  # before the first chunk is asked for


def test_from_pretrained(tmp_path):
    with pytest.raises(FileNotFoundError):
        dsv4_jax.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="index_top"):
        dsv4_jax.from_pretrained(SHARP, index_top=3)
    folder = shutil.copytree(SHARP, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        dsv4_jax.from_pretrained(folder)
    file.write_bytes(b"PK\x03\x04 not a checkpoint at all" * 9)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        dsv4_jax.from_pretrained(folder)
    assert dsv4_jax.from_pretrained(SHARP).config.index_topk == 24
