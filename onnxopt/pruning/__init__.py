"""Weights and channels that a model can do without: found, chosen and taken out."""
