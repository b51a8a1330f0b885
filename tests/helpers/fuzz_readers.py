"""Damaged files for the readers: what a reader makes of one must be a result or one sentence, in bounded memory.

Shared by tests/project/test_fuzz_readers.py and scripts/fuzz. Input i of a seed is the same wherever it is made.
"""

import hashlib
import json
import os
import pathlib
import re
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from small_model import SMALL

from dsv4_jax.cache.manager import KVCacheManager
from dsv4_jax.cache.transfer.snapshot_file import load_snapshot, save_snapshot
from dsv4_jax.cli.inspect_report import snapshot_report
from dsv4_jax.files.safetensors_writer import TensorEntry, write_safetensors
from dsv4_jax.model.config import DSV4Config
from dsv4_jax.model.files.checkpoint import load_tensors
from dsv4_jax.model.files.inspection import inspect_checkpoint
from dsv4_jax.model.files.released_form import quantise_checkpoint
from dsv4_jax.model.files.tensor_names import expected_tensors, keeps_float32

MEMORY_BOUND = 16 << 20
"""Bytes that reading one of these inputs may take; the files have 2 to 60 KB."""

MICRO = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "compress_ratios": [4, 128, 0],
    "sliding_window": 128, "max_position_embeddings": 4096, "num_attention_heads": 2, "head_dim": 32, "rope_dim": 16,
    "q_lora_rank": 32, "o_lora_rank": 32, "o_groups": 1, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4,
    "rope_theta": 1e4, "compress_rope_theta": 1.6e5, "rope_factor": 16, "rope_original_max_position": 256,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 32, "num_hash_layers": 1, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
}  # fmt: skip
_NUMBERS = (
    b"-1", b"0", b"1", b"2", b"127", b"128", b"255", b"65535", b"2147483647", b"4294967295", b"9007199254740993",
    b"18446744073709551615", b"-9223372036854775808", b"1e308", b"1e999", b"NaN", b"0.5", b"1" * 400, b"true", b"null",
    b'"128"', b"[]", b"{}", b"[[[[[[[[]]]]]]]]", b'{"a":{"a":{"a":1}}}',
)  # fmt: skip
_JSON_VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"[^"]*"|true|false|null|\[[^\[\]]*\]')


def fast_folder() -> str | None:
    """Where temporary files cost least, for tempfile's `dir`."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Failure(AssertionError):
    """A reader did neither of the things it may do."""


def make_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """A released checkpoint of two layers in two shards, with its index, in `folder`."""
    rng = np.random.default_rng(1)
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(MICRO))
    entries, arrays = [], []
    for name, shape in expected_tensors(DSV4Config.from_hf(MICRO)).items():
        array = rng.standard_normal(shape).astype(np.float32 if keeps_float32(name) else ml_dtypes.bfloat16)
        tag = "F32" if keeps_float32(name) else "BF16"
        if name.endswith("tid2eid"):
            tag, array = "I64", rng.integers(0, 2, shape)
        entries.append(TensorEntry(name, tag, shape))
        arrays.append(array)
    write_safetensors(source / "model.safetensors", entries, arrays)
    quantise_checkpoint(source, folder / "good", shard_bytes=60_000)
    return folder / "good"


def damage(raw: bytes, rng: np.random.Generator) -> bytes:
    """A copy of a JSON or safetensors file with one to four changes.

    In a safetensors file mostly the header changes, and mostly the length in front is made right again, so that what
    the header says is looked at.
    """
    if raw[:1] == b"{":
        return _change(raw, rng)
    size = int.from_bytes(raw[:8], "little")
    header, body = raw[8 : 8 + size], raw[8 + size :]
    kind = rng.random()
    if kind < 0.75:
        header = _change(header, rng)
    if kind > 0.65:
        body = _change(body, rng, text=False)
    if rng.random() < 0.8:
        size = len(header)
    elif rng.random() < 0.5:
        size = int(rng.integers(0, 2 ** int(rng.integers(1, 63))))
    return size.to_bytes(8, "little") + header + body


def _change(raw: bytes, rng: np.random.Generator, text: bool = True) -> bytes:
    data = bytearray(raw)
    for _ in range(1 if rng.random() < 0.6 else rng.integers(2, 5)):
        at = int(rng.integers(0, max(len(data), 1)))
        kind = rng.random()
        if kind < 0.6 and text:  # a JSON value replaced by another
            value, other = _JSON_VALUE.search(data, at), _JSON_VALUE.search(data, int(rng.integers(0, len(data) + 1)))
            if value and other:
                new = other.group() if rng.random() < 0.4 else _NUMBERS[rng.integers(len(_NUMBERS))]
                data[slice(*value.span())] = new
        elif kind < 0.75:
            data[at : at + 1] = bytes([rng.integers(256)])
        elif kind < 0.85:  # cut
            data[at:] = b"" if rng.random() < 0.3 else data[at + int(rng.integers(1, 40)) :]
        elif kind < 0.95:  # said twice
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        else:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(data)


_VALUES = (
    None, True, False, 0, 1, -1, 3, 128, 2**31, 2**64, 10**30, 0.5, 1e300, "", "x", "two\nlines", "x\n" * 2000, [], {},
    [1] * 300, {"a": {"b": [1, None]}}, [[[[1]]]],
)  # fmt: skip


def change_value(value: Any, rng: np.random.Generator) -> Any:
    """A copy of a parsed JSON value with one thing in it replaced, left out, or under another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return _VALUES[rng.integers(len(_VALUES))]
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
    kind = rng.random()
    if kind < 0.8:
        changed[key] = change_value(value[key], rng)
    elif kind < 0.9:
        del changed[key]
    elif isinstance(changed, dict):
        changed[("two\nlines", "y" * 3000, "", "kind")[rng.integers(4)]] = changed.pop(key)
    else:
        changed.insert(key, _VALUES[rng.integers(len(_VALUES))])
    return changed


class Target:
    """One reader and good files for it."""

    def __init__(self, good: pathlib.Path, work: pathlib.Path):
        self.work = work
        self.files = {path.name: path.read_bytes() for path in sorted(good.iterdir())}
        work.mkdir()
        for name, raw in self.files.items():
            (work / name).write_bytes(raw)

    def damaged(self, names: list[str], rng: np.random.Generator) -> str:
        """Damages one of the files on disk -> its name."""
        name = names[rng.integers(len(names))]
        (self.work / name).write_bytes(damage(self.files[name], rng))
        return name

    def restore(self, name: str) -> None:
        """Undoes it."""
        (self.work / name).write_bytes(self.files[name])


class ConfigTarget(Target):
    """config.json alone."""

    def run(self, rng: np.random.Generator) -> None:
        """One input."""
        name = self.damaged(["config.json"], rng)
        if rng.random() < 0.5:
            changed = change_value(json.loads(self.files[name]), rng)
            (self.work / name).write_text(json.dumps(changed))
        try:
            config = DSV4Config.from_hf(self.work)
            assert len(config.compress_ratios) == config.num_hidden_layers == len(config.schedule)
        finally:
            self.restore(name)


class CheckpointTarget(Target):
    """Any file of a sharded, quantised checkpoint."""

    def run(self, rng: np.random.Generator) -> None:
        """One input."""
        name = self.damaged(sorted(self.files), rng)
        try:
            tensors = load_tensors(self.work)
            assert all(np.isfinite(array.astype(np.float32)).any() for array in tensors.values())
        finally:
            self.restore(name)


class InspectTarget(Target):
    """The same files, looked at by `inspect`, which goes on where loading stops."""

    def run(self, rng: np.random.Generator) -> None:
        """One input."""
        name = self.damaged(sorted(self.files), rng)
        try:
            report = inspect_checkpoint(self.work)
            assert report.nbytes == sum(part.nbytes for part in report.parts.values())
        finally:
            self.restore(name)


class SnapshotTarget(Target):
    """The file of a request, what `inspect` says of it, and putting it back into a cache.

    Mostly its checksum is made right again.
    """

    def __init__(self, good: pathlib.Path, work: pathlib.Path):
        self.manager = KVCacheManager(
            SMALL, SMALL.schedule, max_concurrent_requests=1, num_blocks_per_csa_layer=4, num_blocks_per_hca_layer=4,
            max_context_len=48, max_rollback=5,
        )  # fmt: skip
        slot = self.manager.admit_request()
        plan = self.manager.plan_step([slot] * 29, np.arange(29))
        self.manager.cache = self.manager.cache.with_blocks(plan.new_blocks)
        source = good.parent / f"{work.name}-source"
        source.mkdir()
        save_snapshot(self.manager.preempt(slot, rollback=3), source / "request.snapshot")
        super().__init__(source, work)
        self._restore_once()

    def run(self, rng: np.random.Generator) -> None:
        """One input."""
        name = "request.snapshot"
        raw = self.files[name]
        raw = damage(raw, rng) if rng.random() < 0.5 else self._change_header(raw, rng)
        if rng.random() < 0.9:
            raw = raw[:-32] + hashlib.blake2b(raw[:-32], digest_size=32).digest()
        (self.work / name).write_bytes(raw)
        self._restore_once()

    def _change_header(self, raw: bytes, rng: np.random.Generator) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        metadata = header["__metadata__"]
        if rng.random() < 0.8:
            metadata["request"] = json.dumps(change_value(json.loads(metadata["request"]), rng))
        else:
            header["__metadata__"] = change_value(metadata, rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    def _restore_once(self) -> None:
        path = self.work / "request.snapshot"
        snapshot = load_snapshot(path)
        try:
            json.dumps(snapshot_report(str(path), snapshot))
        except ValueError as error:
            if str(path) not in str(error):
                raise
        try:
            slot = self.manager.restore(snapshot)
        except ValueError as error:
            assert not self.manager.active_slots
            raise ValueError(f"{path}: {error}") from None
        self.manager.release_request(slot)


TARGETS = {
    "config": ConfigTarget, "checkpoint": CheckpointTarget, "inspect": InspectTarget, "snapshot": SnapshotTarget
}  # fmt: skip


def fuzz(
    target: Target, inputs: int, seed: int, first: int = 0, done: Callable[[], object] = lambda: None
) -> dict[str, int]:
    """Runs inputs first … first + inputs - 1 of `seed` -> how many were read and how many refused.

    done: called after every input.
    Raises Failure, with the number of the input, for any other outcome: an exception that is no ValueError or
    FileNotFoundError, a message that is not one sentence about the file, a warning, or memory beyond MEMORY_BOUND.
    """
    counts = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for i in range(first, first + inputs):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    target.run(np.random.default_rng([seed, i]))
                counts["read"] += 1
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
                if "\n" in message or len(message) > 1000 or str(target.work) not in message:
                    raise Failure(f"input {i} of seed {seed}: not a sentence about the file: {message!r}") from error
                counts["refused"] += 1
            except Exception as error:
                raise Failure(f"input {i} of seed {seed}: {type(error).__name__}: {error}") from error
            peak = tracemalloc.get_traced_memory()[1] - before
            if peak > MEMORY_BOUND:
                raise Failure(f"input {i} of seed {seed}: took {peak} bytes")
            done()
    finally:
        tracemalloc.stop()
    return counts
