"""What calibration knows of one tensor; what is known of parts of the data merges exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxopt.calibration.histogram import Histogram
from onnxopt.errors import UsageError

__all__ = ["ChannelStatistics", "TensorStatistics"]

_UNIT_BITS = 298
_UNIT = 1 << _UNIT_BITS
"""Numbers of float32 and their squares are whole multiples of 1 / _UNIT: as such they add up exactly."""


def _exact(number: float) -> int:
    numerator, denominator = number.as_integer_ratio()
    return numerator * (_UNIT // denominator)


def _exact_all(numbers: np.ndarray) -> np.ndarray:
    """`_exact` of each: a whole number of 53 bits times a power of two."""
    parts, powers = np.frexp(numbers)
    bits = (parts * 2.0**53).astype(np.int64).tolist()
    shifts = (powers.astype(np.int64) - 53 + _UNIT_BITS).tolist()
    whole = np.empty(len(numbers), object)
    whole[:] = [n << shift if shift >= 0 else n >> -shift for n, shift in zip(bits, shifts, strict=True)]
    return whole


@dataclass(slots=True)
class ChannelStatistics:
    """Of each channel along `axis`, over its finite elements; arrays of shape (channels,).

    minimum, maximum: float32, inf and -inf where there is none. count: int64. Sums of one sample are made in
    float64, and those of samples are added exactly.
    """

    axis: int
    minimum: np.ndarray
    maximum: np.ndarray
    count: np.ndarray
    exact_sum: np.ndarray = field(repr=False)
    exact_squares: np.ndarray = field(repr=False)

    @property
    def sum(self) -> np.ndarray:
        """float64."""
        return np.array([whole / _UNIT for whole in self.exact_sum], np.float64)

    @property
    def squares(self) -> np.ndarray:
        """The sum of the squares: float64."""
        return np.array([whole / _UNIT for whole in self.exact_squares], np.float64)

    @property
    def mean(self) -> np.ndarray:
        """float64; 0 where a channel has no finite element."""
        mean: np.ndarray = self.sum / np.maximum(self.count, 1)
        return mean

    @classmethod
    def of(cls, array: np.ndarray, axis: int) -> ChannelStatistics:
        """Of one array."""
        x = np.moveaxis(array.astype(np.float32, copy=False), axis, 0)
        x = np.ascontiguousarray(x).reshape(len(x), -1)
        count = np.full(len(x), x.shape[1], np.int64)
        low, high = x.min(axis=1, initial=np.inf), x.max(axis=1, initial=-np.inf)
        if not (np.isfinite(low) & np.isfinite(high)).all():
            finite = np.isfinite(x)
            count = finite.sum(axis=1)
            low = x.min(axis=1, where=finite, initial=np.inf)
            high = x.max(axis=1, where=finite, initial=-np.inf)
            x = np.where(finite, x, np.float32(0))
        total = x.sum(axis=1, dtype=np.float64)
        squares = np.einsum("cp,cp->c", x, x, dtype=np.float64)
        return cls(axis, low, high, count, _exact_all(total), _exact_all(squares))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Of the elements of both. Raises UsageError where the axis or the number of channels differs."""
        if (self.axis, len(self.count)) != (other.axis, len(other.count)):
            raise UsageError(
                f"axis {self.axis} has {len(self.count)} channels, and axis {other.axis} of another sample "
                f"{len(other.count)}: channels are to be the same in all samples"
            )
        return ChannelStatistics(
            self.axis,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.count + other.count,
            self.exact_sum + other.exact_sum,
            self.exact_squares + other.exact_squares,
        )


@dataclass(slots=True)
class TensorStatistics:
    """Of one tensor in all samples.

    samples: those with a finite element. histogram: of the calibration samples. held_out: of the held-out
    samples, which count nowhere else.
    """

    samples: int = 0
    exact_minima: int = field(default=0, repr=False)
    exact_maxima: int = field(default=0, repr=False)
    histogram: Histogram = field(default_factory=Histogram)
    held_out: Histogram = field(default_factory=Histogram)
    channel: ChannelStatistics | None = None

    @property
    def count(self) -> int:
        """Finite elements."""
        return self.histogram.count

    @property
    def nonfinite(self) -> int:
        """NaN and infinite elements."""
        return self.histogram.nonfinite

    @property
    def minimum(self) -> float:
        """Of the finite elements; 0 where there is none."""
        return self.histogram.minimum if self.count else 0.0

    @property
    def maximum(self) -> float:
        """Of the finite elements; 0 where there is none."""
        return self.histogram.maximum if self.count else 0.0

    @property
    def mean_minimum(self) -> float:
        """The mean over the samples of the smallest element of each."""
        return self.exact_minima / (self.samples * _UNIT) if self.samples else 0.0

    @property
    def mean_maximum(self) -> float:
        """The mean over the samples of the largest element of each."""
        return self.exact_maxima / (self.samples * _UNIT) if self.samples else 0.0

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is unusual about the elements, and a user may want to know."""
        said = []
        if not self.count:
            said.append("no finite element")
        elif self.minimum == self.maximum:
            said.append("all zero" if self.maximum == 0 else f"constant, {self.maximum:g}")
        elif self.histogram.whole:
            said.append("integers only")
        if self.nonfinite:
            said.append(f"{self.nonfinite} of {self.count + self.nonfinite} elements are NaN or infinite")
        return tuple(said)

    def observe(self, array: np.ndarray, axis: int | None = None) -> None:
        """Take in the tensor of a calibration sample; `axis`: that of the channels, where they are wanted."""
        extent = self.histogram.add(array)
        if extent is not None:
            self.samples += 1
            self.exact_minima += _exact(extent[0])
            self.exact_maxima += _exact(extent[1])
        if axis is not None:
            seen = ChannelStatistics.of(array, axis)
            self.channel = seen if self.channel is None else self.channel.merge(seen)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Of the elements of both."""
        channel = self.channel or other.channel
        if self.channel and other.channel:
            channel = self.channel.merge(other.channel)
        return TensorStatistics(
            self.samples + other.samples,
            self.exact_minima + other.exact_minima,
            self.exact_maxima + other.exact_maxima,
            self.histogram.merge(other.histogram),
            self.held_out.merge(other.held_out),
            channel,
        )
