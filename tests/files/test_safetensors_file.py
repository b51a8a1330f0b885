"""The safetensors reader: what it reads, and that nothing a file says is believed unchecked."""

import json
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.files.safetensors_file import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, TensorInfo, open_checkpoint


def f32(*shape):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def save(tmp_path, to_bytes):
    """Writes a file of these tensors, or of this header and these bytes; returns its path."""

    def write(tensors=None, *, header=None, body=b"", raw=None, name="model.safetensors"):
        content = raw
        if tensors is not None:
            content = to_bytes[0](tensors)
        elif header is not None:
            content = to_bytes[1](header, body)
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsFile(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < len(str(path)) + 300


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e8m0fnu,
        np.int64,
        np.int32,
        np.int8,
    ],
)
def test_reads_back_what_was_written(save, dtype):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(dtype)
    # An odd number of bytes in front: nothing in the format aligns a tensor.
    file = SafetensorsFile(save({"odd": np.ones(3, np.int8), "x": array, "y": array[0]}))
    assert sorted(file) == ["odd", "x", "y"]
    assert len(file) == 3
    assert file.metadata == {"format": "pt"}
    assert file.info("x").shape == (2, 3, 4)
    assert DTYPES[file.info("x").dtype] == array.dtype
    for name, expected in (("x", array), ("y", array[0])):
        assert file[name].dtype == array.dtype
        assert file[name].tobytes() == expected.tobytes()
        np.testing.assert_array_equal(file.read(name).astype(np.float32), expected.astype(np.float32))


def test_arrays_are_views_of_the_file_and_outlive_the_reader(save):
    path = save({"a": f32(2, 3), "b": f32(4)})
    file = SafetensorsFile(path)
    array = file["b"]
    assert not array.flags.owndata
    assert not array.flags.writeable
    with pytest.raises(KeyError):
        file.read("c")
    del file
    path.unlink()
    np.testing.assert_array_equal(array, f32(4))


def test_scalars_and_empty_tensors(save):
    file = SafetensorsFile(save({"s": np.float32(3).reshape(()), "e": f32(0, 5), "t": f32(2)}))
    assert file["s"].shape == ()
    assert file["s"] == 3
    assert file["e"].shape == (0, 5)
    assert file.info("t") == TensorInfo("F32", (2,), 8, path_size(file) - 8)


def path_size(file):
    return Path(file.path).stat().st_size


def test_fp4_comes_two_to_a_byte(save):
    header = {"w": entry("F4", [2, 4], 0, 4)}
    file = SafetensorsFile(save(header=header, body=b"\x10\x32\x54\x76"))
    assert file.info("w").shape == (2, 4)
    np.testing.assert_array_equal(file["w"], np.array([[0x10, 0x32], [0x54, 0x76]], np.uint8))
    refused(save(header={"w": entry("F4", [4, 1], 0, 2)}, body=b"12"), "an even last size")


def test_agrees_with_the_safetensors_package(data):
    numpy_reader = pytest.importorskip("safetensors.numpy")
    path = data / "sharp_dsv4" / "model.safetensors"
    theirs = numpy_reader.load_file(path)
    ours = SafetensorsFile(path)
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].shape == array.shape
        assert ours[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"w": entry("F32", [2], 0, 8)}, 7, "tensor 'w' ends at byte .* truncated"),
        ({"w": entry("F32", [2], 0, 8)}, 9, "1 bytes follow the last tensor"),
        ({"w": entry("F32", [3], 0, 8)}, 8, r"'w' has 8 bytes: expected 12 for F32 of shape \[3\]"),
        ({"w": entry("F32", [2], 8, 0)}, 8, "'w' has data_offsets"),
        ({"w": entry("F32", [2], -8, 0)}, 8, "'w' has data_offsets"),
        ({"w": entry("F32", [2], 0.0, 8.0)}, 8, "'w' has data_offsets"),
        ({"w": entry("F32", [2], False, 8)}, 8, "'w' has data_offsets"),
        ({"w": entry("F32", [2], 0, 2**70)}, 8, "'w' has data_offsets"),
        ({"w": entry("F32", [-2], 0, 8)}, 8, "'w' has shape"),
        ({"w": entry("F32", [True], 0, 4)}, 4, "'w' has shape"),
        ({"w": entry("F32", "2", 0, 8)}, 8, "'w' has shape"),
        ({"w": entry("F32", [1] * 17, 0, 4)}, 4, "'w' has shape .* 16 sizes"),
        ({"w": entry("F32", [2**40, 2**40], 0, 8)}, 8, "'w' has 8 bytes: expected"),
        ({"w": entry("F32", [2**47] * 16, 0, 8)}, 8, "'w' has 8 bytes: expected an integer of"),
        ({"w": entry("F32", [2**50, 0], 0, 0)}, 0, "'w' has shape"),
        ({"w": entry("F31", [2], 0, 8)}, 8, "'w' has dtype 'F31': expected one of BOOL"),
        ({"w": entry(["F32"], [2], 0, 8)}, 8, "'w' has dtype"),
        ({"w": 3}, 0, "'w' is 3: expected dtype, shape and data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2]}}, 8, "expected dtype, shape and data_offsets"),
        ({"w" * 5000: entry("F32", [3], 0, 8)}, 8, "tensor 'www.* has 8 bytes"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ is"),
        ({"__metadata__": 1}, 0, "__metadata__ is"),
        (
            {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
            12,
            "tensor 'b' overlaps tensor 'a'",
        ),
        (
            {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)},
            8,
            "tensor 'b' overlaps tensor 'a'",
        ),
        (
            {"b": entry("F32", [2], 12, 20), "a": entry("F32", [2], 0, 8)},
            20,
            "tensor 'b' begins 4 bytes too late",
        ),
        ({"a": entry("F32", [2], 4, 12)}, 12, "tensor 'a' begins 4 bytes too late"),
    ],
)
def test_headers_that_lie(save, header, body, message):
    refused(save(header=header, body=bytes(body)), message)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"1234567", "7 bytes, too short"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x80\x02}q" + bytes(100), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (b"<!doctype html><html></html>", "a web page"),
        (bytes(100), "not a safetensors file"),
        (bytes(range(256)), "not a safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "truncated: its header has 1152921504606846976"),
        ((10).to_bytes(8, "little") + b'{"a": [[[[', "not valid JSON"),
        ((10).to_bytes(8, "little") + b'{"a": 1}  ', "tensor 'a' is 1"),
        ((12).to_bytes(8, "little") + b'{"\xff":     1}', "not valid JSON"),
        ((17).to_bytes(8, "little") + b'{"abc":1,"abc":1}', "the key 'abc' is given twice"),
    ],
)
def test_foreign_and_broken_files(save, raw, message):
    refused(save(raw=raw), message)


def test_oversized_and_deep_headers(save):
    deep = b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    refused(save(raw=len(deep).to_bytes(8, "little") + deep), "nested 50001 deep")
    path = save(raw=(MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: the size is claimed, not written
    refused(path, f"at most {MAX_HEADER_BYTES} are read")


def test_every_truncation_is_refused(save, to_bytes):
    raw = to_bytes[0]({"a": f32(2, 3), "b": f32(4)})
    for size in range(len(raw)):
        refused(save(raw=raw[:size]), "truncated|too short|not a safetensors file")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a safetensors file"):
        SafetensorsFile(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="expected a safetensors file, got something else"):
        SafetensorsFile(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.index.json, found neither"):
        open_checkpoint(tmp_path)


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_read_like_one_file(save, tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save({"a": f32(2), "b": f32(3)}, name=first)
    save({"c": f32(4)}, name=second)
    write_index(tmp_path, {"a": first, "c": second, "b": first})
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint) == ["a", "b", "c"]
    assert "c" in checkpoint
    assert "d" not in checkpoint
    assert checkpoint.info("c").shape == (4,)
    assert checkpoint.path_of("c") == str(tmp_path / second)
    np.testing.assert_array_equal(checkpoint["b"], f32(3))
    np.testing.assert_array_equal(checkpoint["c"], f32(4))


def test_one_file_opens_by_folder_and_by_name(save, tmp_path):
    path = save({"a": f32(2)})
    for where in (tmp_path, path):
        np.testing.assert_array_equal(open_checkpoint(where)["a"], f32(2))


def test_shards_may_be_links_as_download_caches_have_them(save, tmp_path):
    blob = save({"a": f32(2)}, name="blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "x.safetensors").symlink_to(blob)
    write_index(folder, {"a": "x.safetensors"})
    np.testing.assert_array_equal(open_checkpoint(folder)["a"], f32(2))


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "x\x1b[2J.safetensors",
        "x\n.safetensors",
        "..",
        "",
        "x.bin",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_cannot_point_outside(save, tmp_path, shard):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save({"a": f32(2)}, name="x.safetensors")
    write_index(folder, {"a": shard})
    with pytest.raises(ValueError, match=r"tensor 'a' is in .*: expected the name of a .safetens"):
        open_checkpoint(folder)


def test_an_index_that_does_not_match(save, tmp_path):
    save({"a": f32(2)}, name="x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(ValueError, match=r"tensor 'b' is not in x.safetensors"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors: no such file, but model"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, ["a"])
    with pytest.raises(ValueError, match=r"weight_map is .*: expected an object"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not valid JSON"):
        open_checkpoint(tmp_path)


def test_an_index_takes_no_more_memory_than_it_has_bytes(save, tmp_path):
    save({"a": f32(2)}, name="x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors"})
    tracemalloc.start()
    try:
        open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        with (tmp_path / "model.safetensors.index.json").open("r+b") as file:
            file.truncate(MAX_HEADER_BYTES + 1)  # sparse: the size is claimed, not written
        with pytest.raises(ValueError, match=rf"index\.json: larger than {MAX_HEADER_BYTES} bytes"):
            open_checkpoint(tmp_path)
    finally:
        tracemalloc.stop()


def survives(raw):
    """The reader refuses `raw` in a ValueError that names the file, or reads all of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        try:
            file = SafetensorsFile(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 (either outcome is right)
            return
        assert sum(file[name].nbytes for name in file) <= len(raw)
        for name in file:
            info = file.info(name)
            assert info.begin + info.nbytes <= len(raw)
            assert file[name].tobytes() == raw[info.begin : info.begin + info.nbytes]


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_fuzz_bytes(data):
    """500 inputs: a good file with up to four bytes replaced, and cut or lengthened."""
    header = {"a": entry("F32", [2], 0, 8), "b": entry("BF16", [1, 2], 8, 12)}
    text = json.dumps(header).encode()
    raw = bytearray(len(text).to_bytes(8, "little") + text + bytes(12))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    survives(bytes(raw[:cut]) + data.draw(st.binary(max_size=4)))


NUMBER = st.integers(-2, 20) | st.integers() | st.none() | st.floats() | st.booleans()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F7"]),
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(NUMBER, max_size=3),
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | st.lists(NUMBER),
    }
)


@settings(max_examples=500, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), size=st.integers(0, 40))
def test_fuzz_headers(header, size):
    """500 inputs: well-formed headers that claim anything."""
    text = json.dumps(header).encode()
    survives(len(text).to_bytes(8, "little") + text + bytes(size))
