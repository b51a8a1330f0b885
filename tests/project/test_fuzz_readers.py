"""Thousands of damaged files: each is read, or refused in a sentence, in bounded memory (see fuzz_readers)."""

import pathlib
import tempfile

import pytest
from fuzz_readers import TARGETS, Failure, fast_folder, fuzz, make_checkpoint

INPUTS = {"config": 2000, "checkpoint": 500, "inspect": 200, "snapshot": 700}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_files(good, name):
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        counts = fuzz(TARGETS[name](good, pathlib.Path(folder) / "work"), INPUTS[name], seed=2606)
    print(name, counts)
    assert counts["read"] + counts["refused"] == INPUTS[name]
    assert min(counts.values()) > INPUTS[name] // 50  # damage that says something: neither always fatal nor harmless


def test_the_fuzzer_sees_what_it_looks_for(good, tmp_path):
    class Broken(TARGETS["config"]):
        def run(self, rng):
            self.outcomes[int(rng.integers(len(self.outcomes)))](self)

    def hog(target):
        bytearray(32 << 20)

    def crash(target):
        raise KeyError("x")

    def two_lines(target):
        raise ValueError(f"{target.work}\nand more")

    for outcome, words in ((hog, "took 33"), (crash, "KeyError"), (two_lines, "not a sentence")):
        target = Broken(good, tmp_path / outcome.__name__)
        target.outcomes = [outcome]
        with pytest.raises(Failure, match=f"input 7 of seed 1: {words}"):
            fuzz(target, 1, seed=1, first=7)
