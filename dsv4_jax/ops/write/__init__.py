"""What a step writes to the cache."""
