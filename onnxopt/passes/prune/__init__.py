"""Passes that take out what a model can nearly do without."""
