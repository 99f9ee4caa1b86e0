"""The workflows behind the public functions."""
