"""Passes that make several small ops of a large one."""
