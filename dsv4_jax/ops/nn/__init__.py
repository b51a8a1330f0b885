"""Layers of the model that are operations of their own."""
