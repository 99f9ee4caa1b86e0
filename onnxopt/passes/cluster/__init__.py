"""Passes that let elements of weights share few values."""
