"""Python's cyclic garbage collector, put off while a graph is rewritten."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["put_off"]


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """No cyclic garbage collection within the block; the collector is left as it was found.

    A graph is some thirty objects a node that refer to each other and stay. While they are made and
    rewritten, the collector would walk all of them again and again: almost half of the time, at 20,000
    nodes. What a rewrite drops is freed without it, but for the removed nodes themselves: they and their
    outputs refer to each other. No weight is among that, so memory stays as it is.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            gc.collect(1)  # what is left is walked once, and counts as old from now on
