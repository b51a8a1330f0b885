"""What tells the cache of one model from that of another."""

import dataclasses
import hashlib
import json
from typing import Any


def model_fingerprint(config: Any, weights: str = "") -> str:
    """64 hexadecimal digits that follow from a configuration (a dataclass) and a fingerprint of the weights.

    weights: whatever text its owner gives the weights, such as a hash of the files; two models with equal
    configurations and texts are taken for the same.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    text = json.dumps([fields, weights], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
