"""A growing histogram whose bins are fine where numbers are small, and whose counts are exact.

A bin holds the numbers of float32 that share sign, exponent and the first 8 bits of the mantissa: 256 bins
to an octave, each 2^k wide and aligned at zero, in 16 octaves below the largest magnitude (the layout of
HdrHistogram). What is smaller shares one bin, and zero has its own. When a larger number arrives the window
moves up by whole octaves, and the lowest bins are added to the one below. So the final window depends on the
largest magnitude only, and the counts on nothing but the elements: not on their order, nor on the pieces they
came in. Beside an outlier of 1000 times the bulk, the bulk still has 6 octaves of full resolution; of 4096
bins of one width it would have four.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = ["BINS", "Bins", "Histogram"]

_FRACTION = 8
"""Bits of the mantissa that tell bins apart."""
_SHIFT = np.uint32(23 - _FRACTION)
_OCTAVE = 1 << _FRACTION
_OCTAVES = 16
BINS = _OCTAVES * _OCTAVE + 2
"""Of one sign; the first is zero, and the second is for what lies below the octaves."""
_MAGNITUDE, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(31)
_CODES = 1 << (8 + _FRACTION)
_PIECE = 1 << 19
"""Elements worked on at a time, so that temporaries stay small."""
_MANY = 1 << 15
"""Elements that are worth a table of all codes there are."""


@dataclass(frozen=True)
class Bins:
    """What is not empty of a histogram, in ascending order; float64, (n,) each.

    left, right: the range of the elements, equal where they are all one number. weight: their count.
    """

    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray


def _counts() -> np.ndarray:
    return np.zeros((2, BINS), np.int64)


@dataclass(slots=True)
class Histogram:
    """Of all elements added so far, as float32.

    count: finite elements. nonfinite: NaN and infinite ones, counted only. whole: all are integers. minimum,
    maximum: inf and -inf where there is none. top: the biased exponent of the highest octave, 16 at least.
    counts: int64 (2, BINS), of those without a minus sign and of those with.
    """

    count: int = 0
    nonfinite: int = 0
    whole: bool = True
    minimum: float = math.inf
    maximum: float = -math.inf
    top: int = _OCTAVES
    counts: np.ndarray = field(default_factory=_counts, repr=False)

    def add(self, array: np.ndarray) -> tuple[float, float] | None:
        """Count the elements; the smallest and the largest of them, None where none is finite."""
        low, high = math.inf, -math.inf
        for piece in _pieces(array):
            least, most = _ends(piece)
            if not math.isfinite(most - least):  # of NaN and inf, but also of numbers near the largest
                finite = piece[np.isfinite(piece)]
                self.nonfinite += piece.size - finite.size
                if not finite.size:
                    continue
                piece, (least, most) = finite, _ends(finite)
            self._count(piece, least, most)
            low, high = min(low, least), max(high, most)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        return None if low > high else (low, high)

    def _count(self, piece: np.ndarray, least: float, most: float) -> None:
        self.count += piece.size
        self.whole = self.whole and _is_whole(piece)
        self._rise(int(np.float32(max(abs(least), abs(most))).view(np.uint32)) >> 23)
        bits, base = piece.view(np.uint32), self._base
        if piece.size >= _MANY:
            table = np.zeros((2, _CODES), np.int64)
            _increment(table, (bits >> _SHIFT).astype(np.intp))
            self.counts[:, 0] += table[:, 0]
            self.counts[:, 1] += table[:, 1:base].sum(axis=1)
            self.counts[:, 2:] += table[:, base : base + BINS - 2]
            return
        code = ((bits & _MAGNITUDE) >> _SHIFT).view(np.int32)
        place = np.maximum(code - (base - 2), np.minimum(code, 1))
        place += (bits >> _SIGN).view(np.int32) * BINS
        _increment(self.counts, place.astype(np.intp))

    @property
    def zeros(self) -> int:
        """Elements that are zero, or below 4.6e-41."""
        return int(self.counts[:, 0].sum())

    @property
    def _base(self) -> int:
        """The code, exponent and first bits of the mantissa, of the third bin."""
        return (self.top - _OCTAVES + 1) * _OCTAVE

    def _rise(self, top: int) -> None:
        """Move the window up to the octave `top`."""
        shift = min((top - self.top) * _OCTAVE, BINS - 2)
        if shift > 0:
            below = self.counts[:, 2 : 2 + shift].sum(axis=1)
            self.counts[:, 2 : BINS - shift] = self.counts[:, 2 + shift :]
            self.counts[:, BINS - shift :] = 0
            self.counts[:, 1] += below
        self.top = max(self.top, top)

    def merge(self, other: Histogram) -> Histogram:
        """Of the elements of both."""
        merged, top = Histogram(), max(self.top, other.top)
        for one in (self, other):
            part = Histogram(top=one.top, counts=one.counts.copy())
            part._rise(top)
            merged.counts += part.counts
        merged.top, merged.whole = top, self.whole and other.whole
        merged.count, merged.nonfinite = self.count + other.count, self.nonfinite + other.nonfinite
        merged.minimum, merged.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        return merged

    def bins(self, merged: int = 1) -> Bins:
        """The bins that hold something; zero has one of its own, and so have integers that share none.

        merged: how many neighbours become one, a power of two up to 256.
        """
        codes = np.arange(self._base, self._base + BINS - 1, merged, dtype=np.uint32)
        edges = np.concatenate([[0.0], (codes << _SHIFT).view(np.float32).astype(np.float64)])
        near, far = edges[:-1], edges[1:]
        if self.whole:  # a bin up to 1 wide begins at the only integer that may be in it, or just before
            near = np.where(far - near <= 1, np.ceil(near), near)
            far = np.where(far - near <= 1, near, far)
        above = self.counts[:, 2:].reshape(2, -1, merged).sum(axis=2)
        positive, negative = np.concatenate([self.counts[:, 1:2], above], axis=1)
        left = np.concatenate([-far[::-1], [0.0], near])
        right = np.concatenate([-near[::-1], [0.0], far])
        weight = np.concatenate([negative[::-1], [self.zeros], positive])
        there = weight > 0
        clip = (self.minimum, self.maximum)
        return Bins(left[there].clip(*clip), right[there].clip(*clip), weight[there].astype(np.float64))


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements as contiguous float32; numbers too large for it become infinite."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        with np.errstate(over="ignore"):
            yield np.ascontiguousarray(flat[start : start + _PIECE], np.float32)


def _increment(counts: np.ndarray, places: np.ndarray) -> None:
    """Add 1 at each of the flat places; on int64 and intp this is faster than `bincount`."""
    np.add.at(counts.reshape(-1), places, np.int64(1))


def _ends(piece: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest element, and 0 for -0."""
    return float(piece.min()) + 0.0, float(piece.max()) + 0.0


def _is_whole(piece: np.ndarray) -> bool:
    head = piece[:256]
    return bool(np.array_equal(np.rint(head), head)) and bool(np.array_equal(np.rint(piece), piece))
