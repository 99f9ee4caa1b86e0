"""Signal and noise by slices: an error in a quiet part of an output drowns in the sums over the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Slices", "axes_of"]

_MOST_SLICES = 1 << 16
_LEAST_NUMBERS = 4
"""Fewer numbers may all be near zero by chance, and then are nothing but rounding noise."""


def axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which an output may mix scales: the last one, and axis 1 (channels) of rank 3 and more.

    An axis of size 1 has one slice, which is the whole.
    """
    axes = (-1, 1) if len(shape) > 2 else (-1,) if shape else ()
    return tuple(axis for axis in axes if shape[axis] > 1)


def _zeros() -> np.ndarray:
    return np.zeros(0)


@dataclass
class Slices:
    """Sums over all samples for each slice along `axis`; neighbours share one beyond 65,536 of them.

    Slices whose mean square lies below the square of `tiny`, the smallest normal number of the type, hold
    numbers without relative precision.
    """

    axis: int
    tiny: float
    width: int = 1
    signal: np.ndarray = field(default_factory=_zeros)
    noise: np.ndarray = field(default_factory=_zeros)
    numbers: np.ndarray = field(default_factory=_zeros)

    def add(
        self, shape: tuple[int, ...], positions: np.ndarray, reference: np.ndarray, error: np.ndarray
    ) -> None:
        """Take in elements of an array of `shape`, by their positions in the flattened array."""
        size = shape[self.axis]
        step = 1 if self.axis == -1 else math.prod(shape[self.axis + 1 :])
        self.width = max(self.width, -(-size // _MOST_SLICES))
        index = (positions if step == 1 else positions // step) % size
        if self.width > 1:
            index //= self.width
        self.signal = _added(self.signal, index, reference * reference)
        self.noise = _added(self.noise, index, error * error)
        self.numbers = _added(self.numbers, index, None)

    @property
    def sqnr(self) -> np.ndarray:
        """dB of each slice: inf where it is equal, or has no level of its own.

        It has none where its numbers are fewer than four, or too small for its type, or where squares leave
        float64's range.
        """
        signal, noise = self.signal, self.noise
        judged = (self.numbers >= _LEAST_NUMBERS) & (noise > 0) & (noise < math.inf)
        judged &= (signal > self.numbers * self.tiny**2) & (signal < math.inf)
        levels = np.full(len(signal), math.inf)
        levels[judged] = 10 * (np.log10(signal[judged]) - np.log10(noise[judged]))
        return levels

    def name(self, index: int) -> str:
        """The slice as numpy writes it."""
        first = index * self.width
        shown = f"{first}" if self.width == 1 else f"{first}:{first + self.width}"
        return f"[..., {shown}]" if self.axis == -1 else f"[:, {shown}]"


def _added(sums: np.ndarray, index: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    more = np.bincount(index, weights, minlength=len(sums)).astype(np.float64)
    more[: len(sums)] += sums
    return more
