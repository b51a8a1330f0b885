"""Requests come, go, fork and go back in any order; after every move the cache shows what their tokens say."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from compress_cases import Geometry, expected_entries
from life.machine import play
from life.worlds import Model, Views, small

from dsv4_jax.ops import dispatch


@pytest.mark.skipif("cpu" not in dispatch.available(), reason="without native forms the last bit depends on the shapes")
def test_what_the_cache_shows(say):
    """10,000 moves and more; window rows, entries and keys bit for bit."""
    moves, hits = play(Views(small("fp8")), examples=185, steps=60)
    say(f"{moves:,} moves, derandomised; {hits} prefix hits")
    assert moves >= 10_000
    assert hits >= 100


def test_what_an_exact_cache_shows(say):
    """Without native forms: window rows bit for bit, entries and keys within 1e-5."""
    moves, _ = play(Views(small("fp32")), examples=16, steps=50)
    say(f"{moves:,} moves, derandomised")
    assert moves >= 500


def test_what_a_model_computes(say):
    """Logits of every token, whatever happened to its request and to others before."""
    moves, _ = play(Model(), examples=16, steps=50)
    say(f"{moves:,} moves, derandomised")
    assert moves >= 500


def test_what_a_cache_with_running_tails_shows(say):
    """Sums that enter the state token by token, in whatever pieces the tokens come: the same bits as all at once.

    Steps leave it to the handles to enter their blocks.
    """
    if "cpu" not in dispatch.available():
        pytest.skip("jax.numpy sums in another order for another shape")
    moves, _ = play(Views(small("fp8", hca_tail="running", forgets_blocks=True)), examples=20, steps=60)
    say(f"{moves:,} moves, derandomised")
    assert moves >= 800


@pytest.mark.parametrize("layer", [1, 2])
def test_the_reference_is_the_definition(layer):
    """What sessions are compared with comes from the cache's own operations: it is right, too."""
    fill = small("fp32")
    text = np.random.default_rng(1).integers(0, fill.config.vocab_size, fill.length)
    expected, table = fill.recompute(text[None].astype(np.int32))[layer], fill.tables[layer]
    parts = [(table.kv, table.gate, table.weights, expected.entries, fill.config.head_dim)]
    if expected.keys is not None:
        parts.append((table.key_kv, table.key_gate, table.key_weights, expected.keys, fill.config.index_head_dim))
    for kv, gate, weights, got, dim in parts:
        geometry = Geometry(len(weights.ape), kv.shape[1] // dim, dim, fill.config.rope_dim, 1)
        want = expected_entries(geometry, weights, kv[text], gate[text])
        np.testing.assert_allclose(got[0, : len(want)], want, rtol=0, atol=1e-5)
    rows = table.window[text] + table.by_position
    np.testing.assert_array_equal(expected.rows[0], rows)


def test_soak_prints_its_moves_and_seeds(capsys):
    soak = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "soak"))
    moves = soak["main"](["--moves", "150", "--sessions", "3", "--seed", "11", "--worlds", "fp32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed 11, fp32: ")
    assert lines[-1] == f"{moves} moves, seeds 11 to {10 + len(lines) - 1}: nothing differed"


def test_a_wrong_move_is_found_and_shortened(monkeypatch, capsys):
    """What the sessions compare can differ: with rows of another text it does, after a move or two."""
    world = Views(small("fp8"))
    renew = world.renew

    def wrong(session, slot):
        renew(session, slot)
        session.expected[0].rows[slot, 3] += 1

    monkeypatch.setattr(world, "renew", wrong)
    with pytest.raises(AssertionError, match=r"layer 0 \(SWA\): window rows differ at \[\(\d, 3\)"):
        play(world, examples=20, steps=30)
