"""The model: configuration, layer schedule, checkpoint reading and the Flax modules."""
