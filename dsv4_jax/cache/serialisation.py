"""The cache's pytrees for `jax.export`: a step with a cache and a plan can be written to a file.

Whoever reads it imports this package first, which registers them. Names and contents are part of such files.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from jax import export

from ..ops.formats.record import Record
from ..ops.segments import Segments
from ..ops.write.append_swa import SWARing
from ..ops.write.compress import IndexerKeys
from ..ops.write.compressor_tail import CompressorTail
from ..ops.write.running_tail import RunningTail
from .schema import CacheSchema

for part in (CompressorTail, IndexerKeys, Record, RunningTail, SWARing, Segments):
    export.register_namedtuple_serialization(part, serialized_name=f"dsv4_jax.{part.__name__}")


def serialisable(node: type, to_json: Callable[[Any], Any], from_json: Callable[[Any], Any]) -> None:
    """Registers a pytree whose static part is `to_json(it)`, what JSON can hold, and `from_json` of that."""
    export.register_pytree_node_serialization(
        node,
        serialized_name=f"dsv4_jax.{node.__name__}",
        serialize_auxdata=lambda static: json.dumps(to_json(static)).encode(),
        deserialize_auxdata=lambda stored: from_json(json.loads(stored)),
    )


def schema_to_json(schema: CacheSchema) -> dict[str, Any]:
    """A schema as JSON has it."""
    return dataclasses.asdict(schema)


def schema_from_json(fields: dict[str, Any]) -> CacheSchema:
    """Inverse of schema_to_json."""
    return CacheSchema(**fields)
