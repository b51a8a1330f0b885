"""What a step reads from the cache."""
