"""Names of a checkpoint's tensors, where code written for earlier versions finds them."""

from .files.tensor_names import expected_tensors, released_name

__all__ = ["expected_tensors", "released_name"]
