"""The only host-side reads and writes of the cache's device arrays."""
