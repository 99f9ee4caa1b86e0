"""How far one output is from its reference, summed over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from onnxopt.verification.slices import Slices, axes_of

__all__ = ["Distance", "any_signal", "arrays_of", "distance", "float_info", "is_finite", "is_float"]

_CHUNK = 1 << 20
_MOST_CLASSES = 100_000


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype holds real numbers, ml_dtypes' bfloat16 and float8 included."""
    return "float" in dtype.name


def float_info(dtype: np.dtype[Any]) -> Any:
    """`numpy.finfo`, of ml_dtypes' types too."""
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # ml_dtypes has no types


def arrays_of(value: Any) -> list[np.ndarray | None]:
    """The arrays of an output: itself, the elements of a sequence, None for an empty optional."""
    if isinstance(value, list):
        return [part for element in value for part in arrays_of(element)]
    return [None if value is None else np.asarray(value)]


def is_finite(value: Any) -> bool:
    """Whether no float of an output is NaN or infinite."""
    arrays = [array for array in arrays_of(value) if array is not None and is_float(array.dtype)]
    return all(bool(np.isfinite(array.astype(np.float64)).all()) for array in arrays)


def any_signal(value: Any) -> bool:
    """Whether an output holds anything but zeros."""
    return any(array is not None and bool(np.any(array)) for array in arrays_of(value))


def distance(reference: Any, output: Any) -> Distance:
    """The distance of one sample."""
    found = Distance()
    found.add(reference, output)
    return found


@dataclass
class Distance:
    """Sums over all samples of one output; `add` one sample after the other, then read the figures.

    Floats are compared in float64. NaN equals NaN and an infinity equals itself, in the same place; such
    elements take no part in the sums. 0.0 equals -0.0.
    """

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    energy: float = 0.0
    scale: float = 0.0
    max_abs: float = 0.0
    elements: int = 0
    unequal: int = 0
    strays: int = 0
    """Elements that are NaN or infinite on one side only, or not the same on both."""
    odd: int = 0
    """Elements of the reference that are NaN or infinite."""
    rows: int = 0
    agreeing_rows: int = 0
    float_type: bool = False
    problems: list[str] = field(default_factory=list)
    """Differences of type, shape or length, which no tolerance forgives."""
    slices: dict[int, Slices] = field(default_factory=dict)
    """By axis: the last, and axis 1 of rank 3 and more."""
    sliced: bool = True
    """Whether `slices` are wanted, which take a third of the time."""

    @property
    def equal(self) -> bool:
        return not self.problems and not self.unequal

    @property
    def sqnr(self) -> float:
        """10 log10(sum ref^2 / sum (ref - out)^2) in dB: inf where equal, -inf for a reference of zeros.

        Unequal elements of other types than floats, and differences in `problems`, make it -inf too.
        """
        if self.equal:
            return math.inf
        if self.problems or not self.float_type or (self.max_abs and not self.scale):
            return -math.inf
        if 0 < self.noise < math.inf and 0 < self.signal < math.inf:
            return 10 * math.log10(self.signal / self.noise)
        # Squares left float64's range: the peaks stand in for the sums.
        return 20 * (math.log10(self.scale) - math.log10(self.max_abs)) if self.max_abs else math.inf

    @property
    def max_error(self) -> float:
        """The largest absolute error over the largest absolute value of the reference."""
        if not self.max_abs:
            return 0.0
        return self.max_abs / self.scale if self.scale else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between reference and output; None for other types than floats."""
        if not self.float_type:
            return None
        if not self.signal or not self.energy:
            return 1.0 if self.signal == self.energy else 0.0
        return self.product / math.sqrt(self.signal) / math.sqrt(self.energy)

    @property
    def mismatch(self) -> float:
        """The fraction of elements that are not equal."""
        return self.unequal / self.elements if self.elements else 0.0

    @property
    def top1(self) -> float | None:
        """The fraction of rows with the same largest element.

        Read for floats of rank 2 or 3 with 2 to 100,000 elements on the last axis, as classifiers, taggers
        and language models give; None for others.
        """
        return self.agreeing_rows / self.rows if self.rows else None

    def add(self, reference: Any, output: Any) -> None:
        """Take in one sample: arrays, lists of arrays (sequences) or None (an empty optional)."""
        left, right = arrays_of(reference), arrays_of(output)
        if isinstance(reference, list) != isinstance(output, list) or len(left) != len(right):
            self.problems.append(f"a sequence of {len(left)} became one of {len(right)}")
            return
        for before, after in zip(left, right, strict=True):
            self._add(before, after)

    def _add(self, before: np.ndarray | None, after: np.ndarray | None) -> None:
        if before is None or after is None:
            if before is not after:
                self.problems.append("an optional is empty on one side only")
            return
        if before.dtype != after.dtype and not before.dtype.kind == after.dtype.kind == "U":
            self.problems.append(f"type {before.dtype} became {after.dtype}")
        elif before.shape != after.shape:
            self.problems.append(f"shape {list(before.shape)} became {list(after.shape)}")
        elif not is_float(before.dtype):
            self.elements += before.size
            self.unequal += int(np.count_nonzero(before != after))
        else:
            self.elements += before.size
            self.float_type = True
            left, right = before.reshape(-1), after.reshape(-1)
            for axis in axes_of(before.shape) if self.sliced else ():
                self.slices.setdefault(axis, Slices(axis, float(float_info(before.dtype).smallest_normal)))
            for start in range(0, before.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                self._add_floats(
                    left[part].astype(np.float64), right[part].astype(np.float64), before.shape, start
                )
            self._add_rows(before, after)

    def _add_floats(self, before: np.ndarray, after: np.ndarray, shape: tuple[int, ...], start: int) -> None:
        """Take in a part of an array of `shape` that begins at `start` of the flattened array."""
        with np.errstate(over="ignore", invalid="ignore"):
            error = after - before
        positions = np.arange(start, start + before.size)
        if np.isfinite(error).all():
            self.unequal += int(np.count_nonzero(error))
        else:
            same = (before == after) | (np.isnan(before) & np.isnan(after))
            finite = np.isfinite(before) & np.isfinite(after)
            self.unequal += int(np.count_nonzero(~same))
            self.strays += int(np.count_nonzero(~same & ~finite))
            self.odd += int(np.count_nonzero(~np.isfinite(before)))
            before, after, error, positions = (x[finite] for x in (before, after, error, positions))
        if not before.size:
            return
        with np.errstate(over="ignore", under="ignore"):
            self.signal += float(before @ before)
            self.energy += float(after @ after)
            self.product += float(before @ after)
            self.noise += float(error @ error)
            for axis in axes_of(shape) if self.sliced else ():
                self.slices[axis].add(shape, positions, before, error)
        self.scale = max(self.scale, _peak(before))
        self.max_abs = max(self.max_abs, _peak(error))

    def _add_rows(self, before: np.ndarray, after: np.ndarray) -> None:
        if before.ndim not in (2, 3) or not 2 <= before.shape[-1] <= _MOST_CLASSES or not before.size:
            return
        agree = before.argmax(axis=-1) == after.argmax(axis=-1)
        agree &= np.isnan(before).any(axis=-1) == np.isnan(after).any(axis=-1)  # NaN is argmax
        self.rows += agree.size
        self.agreeing_rows += int(np.count_nonzero(agree))


def _peak(array: np.ndarray) -> float:
    """The largest magnitude."""
    return max(float(array.max()), -float(array.min()))
