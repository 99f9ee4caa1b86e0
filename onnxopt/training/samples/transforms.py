"""What is done to samples: the same in calibration, training and evaluation, but for what is random.

A transform is called with one sample of an input (no batch axis) and a random generator, which is None
where nothing may be left to chance. Its draws depend on the seed, the epoch and the sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.errors import UsageError, one_line
from onnxopt.recipe import parse_spelled
from onnxopt.synthesis.inputs import Input

__all__ = ["TRANSFORMS", "Mixup", "Transform", "is_for", "parse_transforms"]

Random = np.random.Generator | None


@dataclass(frozen=True)
class Transform:
    """input: what it is for; by default each float input with two axes or more in a sample. Pixels of
    uint8 become floats first."""

    input: str = ""

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        raise NotImplementedError

    def applied(self, x: np.ndarray, random: Random) -> np.ndarray:
        """The same; UsageError where the options do not go with the sample."""
        try:
            return self(x, random)
        except (ValueError, IndexError) as error:
            shape = " x ".join(map(str, x.shape))
            raise UsageError(f"transforms: {self} fails on {shape}: {one_line(error)}") from None


@dataclass(frozen=True)
class Normalize(Transform):
    """(x - mean) / std; several numbers go along `axis`."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    axis: int = 0

    def __post_init__(self) -> None:
        if not all(self.std):
            raise UsageError("transforms: normalize: std is 0")

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        mean, std = (np.reshape(np.array(one, x.dtype), shape) for one in (self.mean, self.std))
        return np.asarray((x - mean) / std, x.dtype)


@dataclass(frozen=True)
class Flip(Transform):
    """Mirror an axis, of every other sample."""

    axis: int = -1

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        return np.flip(x, self.axis) if random is not None and random.random() < 0.5 else x


@dataclass(frozen=True)
class Shift(Transform):
    """Move along `axes` by up to `by` elements either way; what comes in is `fill`."""

    by: int = 1
    axes: tuple[int, ...] = (-2, -1)
    fill: float = 0.0

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        if random is None:
            return x
        widths = [(0, 0)] * x.ndim
        where = [slice(None)] * x.ndim
        for axis in self.axes:
            widths[axis], start = (self.by, self.by), int(random.integers(2 * self.by + 1))
            where[axis] = slice(start, start + x.shape[axis])
        return np.asarray(np.pad(x, widths, constant_values=self.fill)[tuple(where)])


@dataclass(frozen=True)
class Crop(Transform):
    """Cut out `size` elements of each of `axes`, anywhere; from the middle where nothing is random."""

    size: int = 0
    axes: tuple[int, ...] = (-2, -1)

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        where = [slice(None)] * x.ndim
        for axis in self.axes:
            room = x.shape[axis] - self.size
            if room < 0 or self.size < 1:
                raise UsageError(f"transform crop: cannot cut {self.size} out of {x.shape[axis]} elements")
            start = room // 2 if random is None else int(random.integers(room + 1))
            where[axis] = slice(start, start + self.size)
        return x[tuple(where)]


@dataclass(frozen=True)
class Noise(Transform):
    """Add normal noise."""

    std: float = 0.1

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        return x if random is None else x + random.normal(0, self.std, x.shape).astype(x.dtype)


@dataclass(frozen=True)
class Gain(Transform):
    """Multiply by one random number."""

    low: float = 0.8
    high: float = 1.2

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        return x if random is None else x * x.dtype.type(random.uniform(self.low, self.high))


@dataclass(frozen=True)
class Erase(Transform):
    """Set a random square (along the last two axes) to `fill` (cutout, 1708.04552)."""

    size: int = 2
    fill: float = 0.0

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        if random is None:
            return x
        top, left = (int(random.integers(1 - self.size, x.shape[axis])) for axis in (-2, -1))
        erased = x.copy()
        erased[..., max(top, 0) : top + self.size, max(left, 0) : left + self.size] = self.fill
        return erased


@dataclass(frozen=True)
class Mixup(Transform):
    """Mix each sample with another of its batch, and their losses likewise (1710.09412).

    The share is drawn from Beta(alpha, alpha). `Trainer` does the mixing: it is of batches.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UsageError(f"transforms: mixup: alpha is {self.alpha:g}, not above 0")

    def __call__(self, x: np.ndarray, random: Random) -> np.ndarray:
        return x


TRANSFORMS: Mapping[str, Callable[..., Transform]] = {
    "crop": Crop,
    "erase": Erase,
    "flip": Flip,
    "gain": Gain,
    "mixup": Mixup,
    "noise": Noise,
    "normalize": Normalize,
    "shift": Shift,
}


def parse_transforms(texts: Sequence[str]) -> tuple[Transform, ...]:
    """The transforms of these spellings. Raises UsageError where one cannot be read."""
    return tuple(parse_spelled(text, TRANSFORMS, "transform") for text in texts)


def is_for(one: Transform, item: Input, array: np.ndarray) -> bool:
    """Whether a transform is for that input and what it is given."""
    if one.input:
        return one.input == item.name
    return array.ndim > 2 and item.dtype.kind == "f" and (array.dtype.kind == "f" or array.dtype == np.uint8)
