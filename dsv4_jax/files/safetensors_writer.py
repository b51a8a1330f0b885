"""Writing safetensors files tensor by tensor: sizes first, bytes as they come, so that little is held in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from dsv4_jax.files.safetensors_file import DTYPES


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file to be written.

    Attributes:
      name: as the header is to have it.
      dtype: safetensors' name of the type, a key of `DTYPES`.
      shape: of the array that brings the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Sequence[TensorEntry],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Writes a file with `entries` in their order; `arrays` brings the array of each, one after the other.

    Args:
      path: the file.
      entries: names, types and shapes, in the order of the bytes.
      arrays: the arrays, in that order.
      metadata: texts by name for the header.

    Raises:
      ValueError: an array that is not what its entry says, fewer or more of them, or a name given twice.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"{os.fspath(path)}: tensor {entry.name!r} is given twice")
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, array in zip(entries, arrays, strict=True):
            if array.shape != entry.shape or array.dtype != DTYPES[entry.dtype]:
                raise ValueError(
                    f"{os.fspath(path)}: tensor {entry.name!r} is {array.dtype}{array.shape}: "
                    f"expected {entry.dtype}{entry.shape}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
