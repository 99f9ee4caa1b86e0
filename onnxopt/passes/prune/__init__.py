"""Passes that take out weights, channels and layers that a model can do without."""
