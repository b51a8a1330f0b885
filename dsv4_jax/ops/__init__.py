"""Operations on the cache's arrays: one file per op, with its contract, its ``jax.numpy`` form and its native dispatch."""
