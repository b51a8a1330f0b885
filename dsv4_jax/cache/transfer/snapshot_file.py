"""Snapshots in files: safetensors, written whole, read only when every byte is as it was."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from ...files.safetensors_file import DTYPES, SafetensorsFile
from ...files.safetensors_writer import TensorEntry, write_safetensors
from ...files.untrusted_json import parse_json_object, shorten
from ...files.written_whole import written_whole
from ..schema import CacheSchema
from .snapshot import Snapshot

FORMAT = "dsv4_jax.snapshot"
VERSION = 1
_CHECKSUM_BYTES = 32
_TAGS = {dtype: tag for tag, dtype in DTYPES.items() if tag != "F4"}


def save_snapshot(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Writes a snapshot to a safetensors file, whole or not at all.

    The header has the geometry, the last tensor a checksum of every other byte.

    Args:
      snapshot: from `KVCacheManager.snapshot` or `preempt`.
      path: of the file.

    Raises:
      ValueError: no file can be written there, or this is no snapshot.
    """
    if not isinstance(snapshot, Snapshot):  # a path perhaps: the arguments in the other order
        raise ValueError(f"save_snapshot: snapshot is {snapshot!r:.80}, expected a Snapshot, then the path")
    request = {
        "length": snapshot.length,
        "rollback": snapshot.rollback,
        "fingerprint": snapshot.fingerprint,
        "layers": list(snapshot.layers),
        "schemas": {kind: dataclasses.asdict(schema) for kind, schema in snapshot.schemas.items()},
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "request": json.dumps(request, sort_keys=True)}
    arrays = {**snapshot.arrays, "checksum": np.zeros(_CHECKSUM_BYTES, np.uint8)}
    entries = [TensorEntry(name, _TAGS[x.dtype], x.shape) for name, x in arrays.items()]
    with written_whole(path) as temporary:
        write_safetensors(temporary, entries, arrays.values(), metadata)
        with open(temporary, "r+b") as file:
            digest = _checksum(file, os.path.getsize(temporary))
            file.seek(-_CHECKSUM_BYTES, os.SEEK_END)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())


def load_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Reads what `save_snapshot` wrote.

    Args:
      path: of the file.

    Returns:
      The snapshot; whether it fits a cache, `KVCacheManager.restore` says.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged in any byte, no snapshot, or of a version that is not read here.
    """
    file = SafetensorsFile(path)
    _check_whole(file)
    raw = parse_json_object(file.metadata.get("request", "").encode(), f"{file.path}: request")
    try:
        fields = _fields(raw)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file.path}: its request is not one of version {VERSION} ({error})") from None
    return Snapshot(**fields, arrays={name: np.array(file[name]) for name in file if name != "checksum"})


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Snapshot from a file's request; TypeError or KeyError for what is none."""
    schemas = {}
    for kind, values in raw["schemas"].items():
        expected = {f.name: f.type for f in dataclasses.fields(CacheSchema)}
        if set(values) != set(expected):
            raise KeyError(f"the fields of the schema {shorten(kind)}")
        schemas[kind] = CacheSchema(**values)
    for name in ("length", "rollback"):
        if type(raw[name]) is not int:
            raise TypeError(f"{name} is {shorten(raw[name])}")
    return {
        "length": raw["length"],
        "rollback": raw["rollback"],
        "fingerprint": str(raw["fingerprint"]),
        "layers": tuple(raw["layers"]),
        "schemas": schemas,
    }


def _check_whole(file: SafetensorsFile) -> None:
    """ValueError unless the file is a snapshot of a version that can be read, and as it was written."""
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{file.path}: a safetensors file, but no snapshot of a request")
    if file.metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{file.path}: a snapshot of version {shorten(file.metadata.get('version'))}: expected {VERSION}"
        )
    size = os.path.getsize(file.path)
    info = file.info("checksum") if "checksum" in file else None
    if info is None or (info.nbytes, info.begin + info.nbytes) != (_CHECKSUM_BYTES, size):
        raise ValueError(f"{file.path}: its last {_CHECKSUM_BYTES} bytes are no checksum")
    with open(file.path, "rb") as raw:
        if _checksum(raw, size) != file["checksum"].tobytes():
            raise ValueError(f"{file.path}: damaged: its checksum does not match its bytes")


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Hash of all bytes of a file but the last ones, where the hash itself lies."""
    digest, left = hashlib.blake2b(digest_size=_CHECKSUM_BYTES), size - _CHECKSUM_BYTES
    file.seek(0)
    while left:
        part = file.read(min(left, 1 << 20))
        digest.update(part)
        left -= len(part)
    return digest.digest()
