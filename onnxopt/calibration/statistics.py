"""What calibration knows of the tensors of a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from onnxopt.calibration.storing import read_tensors, write_tensors
from onnxopt.calibration.tensors import TensorStatistics

__all__ = ["Statistics"]


class Statistics(Mapping[str, TensorStatistics]):
    """By tensor name, in the order they were asked for."""

    def __init__(self, tensors: Mapping[str, TensorStatistics]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> TensorStatistics:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def merge(self, other: Statistics) -> Statistics:
        """Of the samples of both: the same to the bit as if all had been seen in one run, in any order."""
        names = dict.fromkeys((*self, *other))
        none = TensorStatistics()
        return Statistics({n: self.get(n, none).merge(other.get(n, none)) for n in names})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as .npz, atomically. Raises ModelError where that cannot be."""
        write_tensors(Path(path), self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """What `save` wrote. Raises UsageError where that cannot be read."""
        return cls(read_tensors(Path(path))[0])
