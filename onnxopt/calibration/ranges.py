"""From statistics to the range that is quantized: the estimators of the literature, and the best of them.

percentile: Wu et al., "Integer Quantization for Deep Learning Inference", 2020, half of it at each end.
entropy: Migacz, "8-bit Inference with TensorRT", 2017, for bins of any width and either end. mse: the grid
search of Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from onnxopt.calibration.histogram import Bins, Histogram
from onnxopt.calibration.tensors import TensorStatistics
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.quantization.formats import Format, QuantParams, params_from_range

__all__ = ["METHODS", "Range", "choose_range"]

METHODS = ("min-max", "average", "percentile", "entropy", "mse", "auto")
_COMPARED = ("min-max", "average", "percentile", "mse")
"""What `auto` takes the best of. Entropy takes longer than all of them. On held-out samples it would be best
for a tensor in eleven, and win 0.03 dB in the mean over the tensors of 18 models; on samples that nothing was
chosen by it then loses 0.05 dB: as many tensors are better as worse, and some ranges clip far too much."""
_OUTSIDE = 1e-4
"""Share of the elements that `percentile` leaves outside, half of them at each end."""
_COARSE = np.exp2(-np.arange(0, 12, 0.5))
"""Thresholds that are tried first, as parts of the largest magnitude."""
_FINE = np.exp2(np.array([-7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7]) / 16)
"""Those tried next, as multiples of the best of the first."""
_MERGED = 16
"""Bins that are one while thresholds are tried."""

Objective = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of the low and the high ends of some ranges, float64 (n,) each: how bad they are, float64 (n,)."""


@dataclass(frozen=True)
class Range:
    """What is to be quantized without clipping; it holds zero.

    method: of METHODS; where "auto" was asked for, the one that it chose. error: the mean square of the
    difference that quantizing makes, in the tensor's unit squared, on the held-out samples, or where there
    are none on those of calibration.
    """

    low: float
    high: float
    method: str
    error: float


def choose_range(
    stats: TensorStatistics, method: str, form: Format, *, symmetric: bool, power_of_two: bool = False
) -> Range:
    """The range of a tensor for a format, by a method of METHODS.

    auto: of the ranges of all methods but entropy, the one of the smallest error. symmetric, power_of_two:
    how scale and zero point are made of it, as in `params_from_range`. A tensor without finite elements gets
    [0, 0]. Raises UsageError.
    """
    if method not in METHODS:
        raise UsageError(f"unknown calibration method {method!r}{did_you_mean(method, METHODS)}")
    chooser = _Chooser(stats, form, symmetric or form.is_float, power_of_two)
    names = _COMPARED if method == "auto" else (method,)
    return min((chooser.range(name) for name in names), key=lambda found: found.error)


class _Error:
    """The mean square of the difference that quantizing makes, for elements spread evenly in their bins.

    With t = x / scale and n its nearest level, the integral of (t - n)^2 from 0 to t is (t - n)^3 / 3 plus
    what the levels before it add: d^3 / 12 for two levels d apart. A bin counts with the integral at its
    right edge less that at its left one, each over its width: an edge has one weight for all bins it ends.
    """

    def __init__(self, bins: Bins) -> None:
        self.edges, places = np.unique(np.concatenate([bins.left, bins.right]), return_inverse=True)
        left, right = places.reshape(2, -1)
        width = bins.right - bins.left
        share = bins.weight / max(bins.weight.sum(), 1)
        is_point = width == 0
        per_width = np.where(is_point, 0, share) / np.where(is_point, 1, width)
        size = len(self.edges)
        self.spread = np.bincount(right, per_width, size) - np.bincount(left, per_width, size)
        self.points = np.bincount(left[is_point], share[is_point], size)

    def __call__(self, params: QuantParams) -> np.ndarray:
        """`params`: of the whole tensor, each scale an attempt of its own; float64 of their shape."""
        scale = params.scale.astype(np.float64)
        distance, before = _nearest(self.edges / scale[..., None], params)
        square = distance * distance
        error = (square * distance / 3 + before) @ self.spread * scale + square @ self.points
        return np.asarray(np.maximum(error, 0.0) * scale**2)


def _nearest(t: np.ndarray, params: QuantParams) -> tuple[np.ndarray, np.ndarray]:
    """Of numbers in units of the scale: the distance from the nearest level, and the integral up to that."""
    form = params.format
    if not form.is_float:
        zero = params.zero_point[..., None]
        level = np.minimum(np.maximum(np.rint(t), form.low - zero), form.high - zero)
        return t - level, level / 12
    levels = _float_levels(form)
    steps = np.diff(levels)
    index = np.searchsorted(levels[:-1] + steps / 2, t)
    return t - levels[index], np.concatenate([[0.0], np.cumsum(steps**3)])[index] / 12


def _float_levels(form: Format) -> np.ndarray:
    kind = ml_dtypes.float8_e4m3fn if form.name == "float8e4m3fn" else ml_dtypes.float8_e5m2
    every = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


class _Chooser:
    """The estimators, on one tensor."""

    def __init__(self, stats: TensorStatistics, form: Format, symmetric: bool, power_of_two: bool) -> None:
        self.stats, self.form = stats, form
        self.symmetric, self.power_of_two = symmetric, power_of_two
        self.bins = stats.histogram.bins()
        judge: Histogram = stats.held_out if stats.held_out.count else stats.histogram
        self.error = _Error(judge.bins())

    def range(self, method: str) -> Range:
        low, high = self.widest if not self.stats.count else getattr(self, f"_{method.replace('-', '_')}")()
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if self.symmetric:
            low, high = -max(-low, high), max(-low, high)
        return Range(low, high, method, float(self.error(self.params(low, high))))

    def params(self, low: np.ndarray | float, high: np.ndarray | float) -> QuantParams:
        return params_from_range(
            low, high, self.form, symmetric=self.symmetric, power_of_two=self.power_of_two
        )

    @property
    def widest(self) -> tuple[float, float]:
        return min(self.stats.minimum, 0.0), max(self.stats.maximum, 0.0)

    def _min_max(self) -> tuple[float, float]:
        return self.widest

    def _average(self) -> tuple[float, float]:
        return self.stats.mean_minimum, self.stats.mean_maximum

    def _percentile(self) -> tuple[float, float]:
        bins = self.bins
        if self.symmetric:
            near = np.minimum(abs(bins.left), abs(bins.right))
            order = np.argsort(near, kind="stable")
            far = np.maximum(abs(bins.left), abs(bins.right))
            high = _quantile(Bins(near[order], far[order], bins.weight[order]), 1 - _OUTSIDE)
            return -high, high
        return _quantile(bins, _OUTSIDE / 2), _quantile(bins, 1 - _OUTSIDE / 2)

    def _entropy(self) -> tuple[float, float]:
        bins = self.bins
        centre, width = (bins.left + bins.right) / 2, bins.right - bins.left
        some = centre != 0  # zero is exact, and its many elements would hide all others
        centre, weight = centre[some], bins.weight[some]
        width = np.where(width[some] > 0, width[some], 1.0)
        if centre.size < 2:
            return self.widest

        def divergences(lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
            ranges = zip(lows, highs, strict=True)
            return np.array([_divergence(centre, width, weight, self.params(*ends)) for ends in ranges])

        return self._search(divergences)

    def _mse(self) -> tuple[float, float]:
        histogram = self.stats.histogram
        error = _Error(self.bins if histogram.whole else histogram.bins(_MERGED))
        return self._search(lambda lows, highs: error(self.params(lows, highs)))

    def _search(self, objective: Objective) -> tuple[float, float]:
        """The best of a grid of ranges: both ends together, then each end alone."""
        low, high = self.widest
        best = _best((low, high), low * _COARSE, high * _COARSE, objective)
        best = _best(best, best[0] * _FINE, best[1] * _FINE, objective)
        if low < 0 < high and not self.symmetric:
            best = _best(best, best[0], high * _COARSE, objective)
            best = _best(best, best[0], best[1] * _FINE, objective)
            best = _best(best, low * _COARSE, best[1], objective)
            best = _best(best, best[0] * _FINE, best[1], objective)
        return max(best[0], low), min(best[1], high)


def _best(
    ends: tuple[float, float], lows: np.ndarray | float, highs: np.ndarray | float, objective: Objective
) -> tuple[float, float]:
    lows, highs = np.broadcast_arrays(lows, highs)
    lows, highs = np.append(ends[0], lows), np.append(ends[1], highs)
    first = np.argmin(objective(lows, highs))
    return float(lows[first]), float(highs[first])


def _quantile(bins: Bins, share: float) -> float:
    """The number below which that share of the elements lies."""
    upto = np.cumsum(bins.weight)
    want = share * upto[-1]
    index = min(int(np.searchsorted(upto, want)), len(upto) - 1)
    inside = 1 - (upto[index] - want) / bins.weight[index]
    return float(bins.left[index] + inside * (bins.right[index] - bins.left[index]))


def _divergence(centre: np.ndarray, width: np.ndarray, weight: np.ndarray, params: QuantParams) -> float:
    """KL(P, Q): P the elements with those outside put into the outermost bins, Q as their levels show them.

    A level shows its elements, of which none comes from outside, spread evenly over its bins.
    """
    form, zero = params.format, float(params.zero_point)
    t = centre / float(params.scale)
    if form.is_float:
        levels = _float_levels(form)
        inside = (t >= levels[0]) & (t <= levels[-1])
        level = np.searchsorted((levels[1:] + levels[:-1]) / 2, t[inside])
    else:
        inside = (t >= form.low - zero - 0.5) & (t <= form.high - zero + 0.5)
        level = np.rint(t[inside] - (form.low - zero)).astype(np.intp).clip(0)
    if not inside.any():
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    p = weight[first : last + 1].copy()
    mass, spread = np.bincount(level, p), np.bincount(level, width[inside])
    q = mass[level] * width[inside] / spread[level]
    p[0] += weight[:first].sum()
    p[-1] += weight[last + 1 :].sum()
    p /= p.sum()
    q /= q.sum()
    return float(np.sum(p * np.log(p / q)))
