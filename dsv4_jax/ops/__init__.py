"""Operations on the cache's arrays: one file per op, with its contract, `jax.numpy` form and native dispatch."""
