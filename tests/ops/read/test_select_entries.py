"""The indexer's choice of entries."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.ops.read.select_entries import select_top_k


def test_equal_scores_by_lower_index_zeros_of_either_sign_too():
    scores = np.array([[-1.0, -0.0, 0.0, -0.0, 0.0, -np.inf], [0.0, 3.0, -0.0, *[-np.inf] * 3]], np.float32)
    selected = jax.jit(select_top_k, static_argnums=2)(jnp.asarray(scores), jnp.array([5, 3], jnp.int32), 4)
    np.testing.assert_array_equal(selected, [[1, 2, 3, 4], [1, 0, 2, -1]])
