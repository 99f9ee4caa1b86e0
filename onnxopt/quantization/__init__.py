"""Weights and activations in few bits: formats, plans, what a target takes, and what it costs in accuracy."""
