"""Passes that make one operator of the parts it was spelled in."""
