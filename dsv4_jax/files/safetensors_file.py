"""Reading safetensors files by memory mapping, without trusting them.

A safetensors file is 8 bytes of header length (little endian), a JSON header (name -> dtype,
shape, byte range) and the tensors' bytes. Everything the header says is checked against the size
of the file before a byte of data is touched. Unlike the `safetensors` package's numpy reader this
one knows the FP8, E8M0 and FP4 types that released checkpoints are stored in.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_jax.files.untrusted_json import parse_json_object, read_json_object, shorten

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Enough for 250,000 tensors; the largest released model has 150,000 in all its shards.
MAX_HEADER_BYTES = 32 << 20
_MAX_RANK = 16

#: safetensors' name of a type -> the numpy type `read` answers with.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F4": np.dtype(np.uint8),  # two E2M1 values a byte
}

# How files begin that people take for safetensors.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, perhaps a torch checkpoint",
    b"\x80\x02": "a Python pickle, perhaps a torch checkpoint",
    b"version https://git-lfs": "a Git LFS pointer, the file itself was not downloaded",
    b"GGUF": "a GGUF file",
    b"<": "a web page or XML",
    b"\x1f\x8b": "a gzip archive",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
      dtype: safetensors' name of the type, a key of `DTYPES`.
      shape: as stored; for "F4" it counts values, two of them in a byte.
      nbytes: bytes in the file.
      begin: where they start, from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int


class SafetensorsFile(Mapping[str, np.ndarray]):
    """A mapping from name to tensor over one file; no data is read until it is looked at.

    The arrays are read-only views of the memory-mapped file, which stays mapped as long as one
    of them lives. The file must not be shortened meanwhile.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a safetensors file, truncated, or a header that contradicts itself or the
        file; it names the file and, where there is one, the tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"{self.path}: no such file; expected a safetensors file")
        if not os.path.isfile(self.path):
            raise ValueError(f"{self.path}: expected a safetensors file, got something else")
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_begin = _read_header(file, size, self.path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata = _check_metadata(header.pop("__metadata__", None), self.path)
        self._tensors = {
            name: _check_entry(entry, data_begin, f"{self.path}: tensor {shorten(name)}")
            for name, entry in header.items()
        }
        _check_layout(self._tensors, data_begin, size, self.path)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor, from the header alone; KeyError if it has none."""
        return self._tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the file's memory; KeyError if there is none.

        Types as in `DTYPES`. "F4" comes as uint8 with half as many values in the last dimension:
        two E2M1 values a byte, the low four bits first.
        """
        info = self._tensors[name]
        shape = info.shape
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return np.empty(shape, dtype)
        count = info.nbytes // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, info.begin).reshape(shape)

    def forget(self, name: str) -> None:
        """Lets go of the memory that reading the tensor has filled; arrays over it stay right, reading again is slow.

        Without it the mapped pages of a whole checkpoint would count as the process's own, until memory runs short.
        """
        info = self._tensors[name]
        # Whole pages only, so that a neighbour's bytes stay.
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.begin + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    __getitem__ = read

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


class Checkpoint(Mapping[str, np.ndarray]):
    """A mapping from name to tensor over one or several safetensors files.

    Attributes:
      path: the folder or file it was opened from.
      files: the files, by the name the index gives them.
      absent: names of tensors that are not there because nobody needs their file.
    """

    def __init__(
        self,
        path: str,
        files: Mapping[str, SafetensorsFile],
        file_of: Mapping[str, str],
        absent: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.files = dict(files)
        self._file_of = dict(file_of)
        self.absent = tuple(absent)

    def info(self, name: str) -> TensorInfo:
        """Like `SafetensorsFile.info`."""
        return self.files[self._file_of[name]].info(name)

    def read(self, name: str) -> np.ndarray:
        """Like `SafetensorsFile.read`."""
        return self.files[self._file_of[name]].read(name)

    def forget(self, name: str) -> None:
        """Like `SafetensorsFile.forget`."""
        self.files[self._file_of[name]].forget(name)

    __getitem__ = read

    def path_of(self, name: str) -> str:
        """The file a tensor is in, for error messages."""
        return self.files[self._file_of[name]].path

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of


def open_checkpoint(
    folder: str | os.PathLike[str], dispensable: Callable[[str], bool] = lambda name: False
) -> Checkpoint:
    """Opens a checkpoint: its headers are read and checked, its tensors are not read yet.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it
        names, which must be plain file names in the same folder. One safetensors file will do.
      dispensable: whether nobody needs the tensor of this name; a shard that has only such tensors may be missing.

    Raises:
      FileNotFoundError: no such folder, nothing in it to open, or a shard that is missing.
      ValueError: a file that `SafetensorsFile` refuses, an index that is not one, that points
        outside its folder, or that names tensors its shards do not have.
    """
    folder = os.fspath(folder)
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a checkpoint")
    single = folder if os.path.isfile(folder) else os.path.join(folder, SINGLE_FILE)
    if os.path.exists(single):
        file = SafetensorsFile(single)
        return Checkpoint(folder, {SINGLE_FILE: file}, dict.fromkeys(file, SINGLE_FILE))
    index = os.path.join(folder, INDEX_FILE)
    if not os.path.exists(index):
        raise FileNotFoundError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    return _open_sharded(folder, index, dispensable)


def _open_sharded(folder: str, index: str, dispensable: Callable[[str], bool]) -> Checkpoint:
    file_of = read_json_object(index, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(file_of, dict):
        raise ValueError(f"{index}: weight_map is {shorten(file_of)}: expected an object")
    for name, shard in file_of.items():
        # Only the name is judged, not what it resolves to: download caches use symbolic links.
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise ValueError(
                f"{index}: tensor {shorten(name)} is in {shorten(shard)}: expected the name of a "
                ".safetensors file in the same folder"
            )
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(file_of.values())):
        path = os.path.join(folder, shard)
        if os.path.exists(path):
            files[shard] = SafetensorsFile(path)
        elif not all(dispensable(name) for name, file in file_of.items() if file == shard):
            raise FileNotFoundError(f"{path}: no such file, but {INDEX_FILE} names it")
    absent = [name for name, shard in file_of.items() if shard not in files]
    file_of = {name: shard for name, shard in file_of.items() if shard in files}
    for name, shard in file_of.items():
        if name not in files[shard]:
            raise ValueError(f"{index}: tensor {shorten(name)} is not in {shard}, as it says")
    return Checkpoint(folder, files, file_of, absent)


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:") and len(name) < 256


def _read_header(file: Any, size: int, path: str) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors' bytes begin."""
    start = file.read(64)
    if size < 8:
        raise ValueError(f"{path}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= size - 8 or start[8:9] != b"{":
        for magic, kind in _FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: expected a safetensors file, got {kind}")
        if length > size - 8 and start[8:9] == b"{":
            raise ValueError(f"{path}: truncated: its header has {length} bytes, the file {size}")
        raise ValueError(f"{path}: not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError(f"{path}: truncated while it was read")
    return parse_json_object(raw, f"{path}: header"), 8 + length


def _check_metadata(value: Any, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{path}: __metadata__ is {shorten(value)}: expected texts by name")
    return value


def _check_entry(entry: Any, data_begin: int, what: str) -> TensorInfo:
    """One tensor's header entry by itself: known type, sane shape, and a byte range to match."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} is {shorten(entry)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {shorten(dtype)}: expected one of {', '.join(DTYPES)}")
    if not _all_sizes(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"{what} has shape {shorten(shape)}: expected at most {_MAX_RANK} sizes, none below 0")
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{what} has data_offsets {shorten(offsets)}: expected where it begins and ends")
    count = math.prod(shape)
    nbytes = count * DTYPES[dtype].itemsize
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            raise ValueError(f"{what} has shape {shorten(shape)}: expected an even last size, F4 has two values a byte")
        nbytes = count // 2
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{what} has {offsets[1] - offsets[0]} bytes: expected {shorten(nbytes)} for "
            f"{dtype} of shape {shorten(shape)}"
        )
    return TensorInfo(dtype, tuple(shape), nbytes, data_begin + offsets[0])


def _all_sizes(value: Any) -> bool:
    # Also bounds every number, so that products stay small.
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value
    )


def _check_layout(tensors: Mapping[str, TensorInfo], data_begin: int, size: int, path: str) -> None:
    """All tensors together: side by side, without gaps, up to the end of the file."""
    end, before = data_begin, ""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes))
    for name, info in ordered:
        what = f"{path}: tensor {shorten(name)}"
        if info.begin + info.nbytes > size:
            raise ValueError(
                f"{what} ends at byte {info.begin + info.nbytes}, but the file has {size}: "
                "truncated, or not what its header says"
            )
        if info.begin < end:
            raise ValueError(f"{what} overlaps tensor {shorten(before)}")
        if info.begin > end:
            raise ValueError(f"{what} begins {info.begin - end} bytes too late: expected no gaps")
        end, before = info.begin + info.nbytes, name
    if end != size:
        raise ValueError(f"{path}: {size - end} bytes follow the last tensor: expected none")
