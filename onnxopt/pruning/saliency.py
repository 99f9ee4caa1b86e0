"""How much single elements of a weight matter, and exactly so many that matter least.

Sources: magnitude, as in Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
2015; its square, comparable between layers, as in Lee et al., "Layer-adaptive Sparsity for the
Magnitude-based Pruning" (LAMP), 2021; magnitude times the norm of what it is multiplied with, as in Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.pruning.weights import StoredWeight

__all__ = ["Cut", "Score", "Scored", "lamp", "least_of_lines", "magnitude", "noise"]

_SLAB = 1 << 20
"""Keys that are counted at once; it takes 16 bytes for each."""

Score = Callable[[str, np.ndarray], np.ndarray]
"""From the name of a weight and its float32 numbers to scores of the same shape; the least go first."""


def magnitude(_name: str, numbers: np.ndarray) -> np.ndarray:
    """|w|."""
    return np.asarray(np.abs(numbers))


def lamp(_name: str, numbers: np.ndarray) -> np.ndarray:
    """w^2 over the sum of all squares in the layer that are at least as large: 1 for the largest.

    The order within a layer is that of |w|; between layers, each keeps its largest elements. In the sums,
    magnitudes that are the same in the upper half of their bits, within 1/128, count as the same.
    """
    return _lamp(lambda: [numbers])(numbers)


def _lamp(parts: Callable[[], Iterable[np.ndarray]]) -> Callable[[np.ndarray], np.ndarray]:
    """The score of elements of a layer that consists of these parts."""
    squares = np.zeros(1 << 16)
    for numbers in parts():
        sizes = np.abs(numbers.reshape(-1))
        squares += np.bincount(sizes.view(np.uint32) >> 16, np.square(sizes, dtype=np.float64), 1 << 16)
    left = np.maximum(np.cumsum(squares[::-1])[::-1], np.finfo(np.float64).tiny)

    def score(numbers: np.ndarray) -> np.ndarray:
        sizes = np.ascontiguousarray(np.abs(numbers))
        return np.asarray(np.square(sizes, dtype=np.float64) / left[sizes.view(np.uint32) >> 16], np.float32)

    return score


def noise(seed: int) -> Score:
    """Uniform random scores, the same for the same seed and name."""

    def score(name: str, numbers: np.ndarray) -> np.ndarray:
        return np.random.default_rng([seed, *name.encode()]).random(numbers.shape, np.float32)

    return score


@dataclass(frozen=True)
class Scored:
    """A weight with the scores of its elements.

    score: of an array of its numbers. apart: whether these may be a part of them.
    """

    weight: StoredWeight
    score: Callable[[np.ndarray], np.ndarray]
    apart: bool

    @classmethod
    def of(cls, weight: StoredWeight, score: Score) -> Scored:
        """By a score of any kind."""
        apart = score in (magnitude, lamp)
        if score is lamp:
            return cls(weight, _lamp(lambda: map(weight.numbers, weight.parts())), apart)
        return cls(weight, partial(score, weight.name), apart)

    def ranks(self) -> Iterator[np.ndarray]:
        """Scores as uint32 that are ordered as they are; 0 for elements that are zero; in order.

        Raises:
            UsageError: the score gives another shape, or a number that is not finite.
        """
        weight = self.weight
        for stored in weight.parts() if self.apart else [weight.stored()]:
            scores = np.asarray(self.score(weight.numbers(stored)), np.float32)
            if scores.shape != stored.shape or not np.isfinite(scores).all():
                found = "scores that are not finite"
                if scores.shape != stored.shape:
                    found = f"shape {list(scores.shape)}"
                raise UsageError(
                    f"scores of {weight.name!r}: {found}; expected one finite number for each element"
                )
            keys = (scores + np.float32(0)).view(np.uint32)  # -0.0 ranks as 0.0
            negative = scores < 0
            np.invert(keys, out=keys, where=negative)
            np.bitwise_or(keys, np.uint32(1 << 31), out=keys, where=~negative)
            keys[weight.zeros(stored)] = 0
            yield keys


@dataclass
class Cut:
    """Where the elements that go end: all keys below `key`, and of those equal to it the first `ties`."""

    key: int
    ties: int

    @classmethod
    def at(cls, chunks: Callable[[], Iterable[np.ndarray]], count: int) -> Cut:
        """For exactly `count` of the uint32 keys in all chunks, which are gone through twice.

        Counted by the upper half of the keys, then by the lower half where the cut falls: however many keys
        there are, 2^16 counters tell.
        """
        key = left = 0
        for shift in (16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for flat in (part for keys in chunks() for part in _slabs(keys)):
                inside = flat if shift else flat[flat >> 16 == key]
                counts += np.bincount((inside >> shift) & 0xFFFF, minlength=1 << 16)
            if shift:
                left = min(count, int(counts.sum()))
            below = np.cumsum(counts)
            part = int(np.searchsorted(below, left))
            left -= int(below[part - 1]) if part else 0
            key = key << 16 | part
        return cls(key, left)

    def take(self, keys: np.ndarray) -> np.ndarray:
        """Which of these keys go; what ties they take is gone for the next ones."""
        gone = keys < self.key
        if self.ties:
            equal = np.flatnonzero(keys.reshape(-1) == self.key)[: self.ties]
            gone.reshape(-1)[equal] = True
            self.ties -= len(equal)
        return np.asarray(gone)


def least_of_lines(keys: np.ndarray, lines: np.ndarray, count: int, length: int = 0) -> np.ndarray:
    """The least elements of each line, or of each stretch of `length` elements of it.

    Args:
        keys: of all elements.
        lines: places in the flat keys, [lines, elements of a line].
        count: how many go.
        length: the last stretch counts as filled up with zeros.

    Returns: bool of the shape of the keys, True where an element goes.
    """
    size = lines.shape[1]
    length = length or size
    flat, result = keys.reshape(-1), np.zeros(keys.size, bool)
    step = max(1, _SLAB // max(1, size))
    for part in (lines[start : start + step] for start in range(0, len(lines), step)):
        stretches = np.pad(flat[part], ((0, 0), (0, -size % length))).reshape(len(part), -1, length)
        order = np.argsort(stretches, axis=-1, kind="stable")
        gone = np.zeros(stretches.shape, bool)
        if size % length:
            order[:, -1] = _filling_first(order[:, -1], size % length)
        np.put_along_axis(gone, order[..., :count], True, axis=-1)
        result[part] = gone.reshape(len(part), -1)[:, :size]
    return result.reshape(keys.shape)


def _filling_first(order: np.ndarray, real: int) -> np.ndarray:
    """An order of elements in which those behind the first `real` ones come first."""
    again = np.argsort(order < real, axis=-1, kind="stable")
    return np.take_along_axis(order, again, axis=-1)


def _slabs(keys: np.ndarray) -> Iterator[np.ndarray]:
    flat = keys.reshape(-1)
    return (flat[start : start + _SLAB] for start in range(0, flat.size, _SLAB))
