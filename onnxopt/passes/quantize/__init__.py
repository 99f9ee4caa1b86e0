"""Passes that work out what is known before the model runs."""
