"""How records and indexer keys are stored."""
