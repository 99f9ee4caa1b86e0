"""Passes that put integers in the place of floats, or floats back in the place of integers."""
