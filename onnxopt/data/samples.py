"""Samples: complete feeds, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

__all__ = ["Feeds", "Samples"]

Feeds = dict[str, np.ndarray]
"""One complete sample: graph input name -> array."""


class Samples(Sequence[Feeds]):
    """Feeds that are read and checked when they are asked for."""

    def __init__(self, length: int, read: Callable[[int], Feeds]) -> None:
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Feeds | Samples:
        chosen = range(self._length)[index]
        if isinstance(chosen, range):
            return Samples(len(chosen), lambda number: self._read(chosen[number]))
        return self._read(chosen)
