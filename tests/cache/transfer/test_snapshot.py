"""Snapshots as objects and as files: their size, what they hold, and everything that is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from small_model import SMALL

from dsv4_jax import DSV4Config, KVCacheManager, build_schedule
from dsv4_jax.cache.transfer.snapshot_file import load_snapshot, save_snapshot

LENGTH = 29  # two blocks of 12 and some, windows of 4 and 6 open

step = jax.jit(lambda cache, plan: cache.with_blocks(plan.new_blocks), donate_argnums=0)


def make(config=SMALL, blocks=6, **options):
    options = {"max_concurrent_requests": 2, "max_context_len": 48, **options}
    return KVCacheManager(
        config, build_schedule(config), num_blocks_per_csa_layer=blocks, num_blocks_per_hca_layer=blocks, **options
    )


def write(manager, length):
    """A request of that many tokens, with random bytes wherever the cache holds values."""
    slot = manager.admit_request()
    manager.cache = step(manager.cache, manager.plan_step([slot] * length, np.arange(length)))
    rng = np.random.default_rng(length)

    def noise(x):
        bits = rng.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)
        return x if x.dtype == np.int32 else jax.numpy.asarray(bits)

    state, paged = jax.tree.map(noise, (manager.cache.state, manager.cache.paged))
    manager.cache = manager.cache.replace_state(state, paged, manager.cache.block_table)
    return slot


def book(manager):
    tables = {k: np.asarray(t).tolist() for k, t in manager.cache.block_table.items()}
    return manager.active_slots, {k: manager.num_free_blocks(k) for k in tables}, tables


@pytest.fixture(scope="module")
def snapshot():
    manager = make(max_rollback=5)
    return manager.snapshot(write(manager, LENGTH), rollback=3)


def test_a_flash_snapshot_at_a_multiple_of_128_is_small():
    """127 ring rows of 43 layers and lane a of four tokens in 21: not the HCA tails, not the rest of the ring."""
    manager = make(DSV4Config.flash(), 2, max_concurrent_requests=1, max_context_len=256, cache_dtype="fp8_ue8m0")
    slot = manager.admit_request()
    manager.cache = step(manager.cache, manager.plan_step([slot] * 256, np.arange(256)))
    snapshot = manager.snapshot(slot)
    assert snapshot.state_nbytes == 43 * 127 * 584 + 21 * 4 * 2 * 4 * (512 + 128)
    assert snapshot.state_nbytes <= 3_700_000
    assert manager.restore(manager.preempt(slot)) == slot
    manager.check()


def test_what_a_snapshot_holds(snapshot):
    """29 tokens, the last 3 of which may be forgotten: from 26 tokens on everything is there."""
    first = {name: x.shape[:2] for name, x in snapshot.arrays.items()}
    assert first["swa.ring.nope"] == first["csa.ring.rope"] == (1, 10)  # positions 19 … 28
    assert first["csa.tail.ka"] == first["csa.indexer_tail.za"] == (1, 9)  # positions 20 … 28: lane a of 20 … 23
    assert first["csa.tail.kb"] == (1, 5)
    assert first["hca.tail.ka"] == (1, 5)
    assert first["csa.entries.nope"] == first["csa.indexer.keys"] == (1, 7)
    assert first["hca.entries.inv_scale"] == (1, 4)
    assert snapshot.state_nbytes < snapshot.nbytes


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 11, 12, 24, LENGTH, 48])
def test_restored_elsewhere_it_is_the_same(length):
    """Through a manager with other slots, blocks and slack and back, every byte of a snapshot stays."""
    here, there = (
        make(blocks=8, max_rollback=5),
        make(blocks=9, max_concurrent_requests=3, max_context_len=60, debug_nan=True),
    )
    slot = write(here, length)
    snapshot = here.snapshot(slot)
    there.admit_request()
    other = there.restore(snapshot)
    assert (other, there.length(other)) == (1, length)
    there.check()
    again = there.preempt(other)
    assert {n: x.tobytes() for n, x in again.arrays.items()} == {n: x.tobytes() for n, x in snapshot.arrays.items()}
    there.check()
    assert there.num_free_blocks("csa") == 9
    back = here.restore(again)
    here.check()
    assert dataclasses.asdict(here.snapshot(back))["length"] == length


def test_rollback_after_a_restore_is_what_the_snapshot_kept(snapshot):
    manager = make(max_rollback=5)
    slot = manager.restore(snapshot)
    with pytest.raises(ValueError, match=r"cannot roll back 4 tokens: it has 29 .* expected 0 to 3"):
        manager.rollback(slot, 4)
    with pytest.raises(ValueError, match="rollback is 4: slot 0 can go back by 0 to 3 tokens"):
        manager.snapshot(slot, rollback=4)
    manager.rollback(slot, 3)
    manager.check()
    less = make(max_rollback=1)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        less.rollback(less.restore(snapshot), 2)


def test_what_does_not_fit_is_refused_and_changes_nothing(snapshot):
    for manager, error, message in [
        (make(SMALL.replace(rms_norm_eps=1e-5)), ValueError, "of another model: its fingerprint is"),
        (make(fingerprint="other weights"), ValueError, "of another model: its fingerprint is"),
        (make(cache_dtype="bf16"), ValueError, r"CSA layers have cache_dtype 'fp8', this cache's 'bf16'"),
        (make(indexer_dtype="mxfp4"), ValueError, "have indexer_dtype 'nvfp4', this cache's 'mxfp4'"),
        (make(max_context_len=28), ValueError, r"has 29 tokens.*room for 28 in a request \(max_context_len\)"),
        (make(blocks=2), RuntimeError, "OOM: 3 more CSA blocks are needed, 2 are free"),
    ]:
        before = book(manager)
        with pytest.raises(error, match=message):
            manager.restore(snapshot)
        with pytest.raises(ValueError, match="restore got a NoneType: expected a Snapshot"):
            manager.restore(None)
        assert book(manager) == before
        manager.check()
    full = make(max_concurrent_requests=1)
    full.admit_request()
    with pytest.raises(RuntimeError, match="all 1 concurrent requests are running"):
        full.restore(snapshot)
    full.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("csa", "swa", "hca")}, "3 layers of other kinds than this cache's 3"),
        ({"rollback": 30}, "has 29 tokens, 30 of them to roll back"),
        ({"length": 28}, "array 'csa.indexer_tail.ka' is .* expected"),
        ({"arrays": {}}, "array 'csa.entries.inv_scale' is missing: expected"),
    ],
)
def test_made_up_snapshots_are_refused(snapshot, change, message):
    manager = make(max_rollback=5)
    with pytest.raises(ValueError, match=message):
        manager.restore(dataclasses.replace(snapshot, **change))
    assert manager.active_slots == []


# Files.


@pytest.fixture
def path(snapshot, tmp_path):
    save_snapshot(snapshot, tmp_path / "request.safetensors")
    return tmp_path / "request.safetensors"


def test_a_file_holds_it_all(snapshot, path):
    loaded = load_snapshot(path)
    for field in ("length", "rollback", "fingerprint", "layers", "schemas"):
        assert getattr(loaded, field) == getattr(snapshot, field)
    assert loaded.arrays.keys() == snapshot.arrays.keys()
    for name, x in snapshot.arrays.items():
        assert (loaded.arrays[name].dtype, loaded.arrays[name].tobytes()) == (x.dtype, x.tobytes())
    manager = make()
    manager.restore(loaded)
    manager.check()


def test_one_flipped_byte_is_refused(path):
    """Every third byte of the header, every 23rd of the tensors, and the checksum's own."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, header, 3), *range(header, len(data) - 32, 23), *range(len(data) - 32, len(data))]
    accepted = []
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            load_snapshot(path)
            accepted.append(place)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 a loop of thousands
    assert len(places) > 1000
    assert accepted == []


def test_files_that_are_none(path, data, to_bytes, snapshot):
    whole = path.read_bytes()
    for raw, message in [
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-1], "truncated"),
        (whole[:100], "truncated"),
        (b"", "0 bytes, too short"),
        (whole + b"\0", "1 bytes follow the last tensor"),
        ((data / "sharp_dsv4" / "model.safetensors").read_bytes(), "a safetensors file, but no snapshot of a request"),
        (to_bytes[1]({"__metadata__": {"format": "dsv4_jax.snapshot", "version": "2"}}, b""), "of version '2'"),
        (to_bytes[1]({"__metadata__": {"format": "dsv4_jax.snapshot", "version": "1"}}, b""), "32 bytes are no check"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            load_snapshot(path)
    with pytest.raises(FileNotFoundError):
        load_snapshot(path.with_name("missing"))
    with pytest.raises(ValueError, match="cannot be written"):
        save_snapshot(snapshot, path.with_name("no") / "folder")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(path, snapshot):
    before = path.read_bytes()
    broken = dataclasses.replace(snapshot, arrays={**snapshot.arrays, "x": np.zeros(2, np.complex64)})
    with pytest.raises(KeyError):
        save_snapshot(broken, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
