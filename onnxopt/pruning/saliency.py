"""How much single elements of a weight matter, and exactly so many that matter least.

Sources: magnitude, as in Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
2015; its square, comparable between layers, as in Lee et al., "Layer-adaptive Sparsity for the
Magnitude-based Pruning" (LAMP), 2021; magnitude times the norm of what it is multiplied with, as in Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.pruning.weights import StoredWeight

__all__ = ["Cut", "Score", "keys_of", "lamp", "least_of_lines", "magnitude", "noise"]

_SLAB = 1 << 22
"""Keys that are counted at once; it takes 16 bytes for each."""

Score = Callable[[str, np.ndarray], np.ndarray]
"""From the name of a weight and its float32 numbers to scores of the same shape; the least go first."""


def magnitude(_name: str, numbers: np.ndarray) -> np.ndarray:
    """|w|."""
    return np.asarray(np.abs(numbers))


def lamp(_name: str, numbers: np.ndarray) -> np.ndarray:
    """w^2 over the sum of all squares in the layer that are at least as large: 1 for the largest.

    The order within a layer is that of |w|; between layers, each keeps its largest elements.
    """
    sizes = np.abs(numbers.reshape(-1))
    order = np.argsort(sizes)
    ascending = sizes[order]
    squares = np.square(ascending, dtype=np.float64)
    left = np.cumsum(squares[::-1])[::-1]
    first = np.searchsorted(ascending, ascending)  # of equal ones
    scores = np.empty(sizes.shape, np.float32)
    scores[order] = squares / np.maximum(left[first], np.finfo(np.float64).tiny)
    return scores.reshape(numbers.shape)


def noise(seed: int) -> Score:
    """Uniform random scores, the same for the same seed and name."""

    def score(name: str, numbers: np.ndarray) -> np.ndarray:
        return np.random.default_rng([seed, *name.encode()]).random(numbers.shape, np.float32)

    return score


def keys_of(weight: StoredWeight, score: Score) -> np.ndarray:
    """Scores as uint32 that are ordered as they are, shape of the weight; 0 for elements that are zero.

    Raises:
        UsageError: the score gives another shape, or a number that is not finite.
    """
    stored = weight.stored()
    scores = np.asarray(score(weight.name, weight.numbers(stored)), np.float32)
    if scores.shape != weight.shape or not np.isfinite(scores).all():
        found = (
            f"shape {list(scores.shape)}" if scores.shape != weight.shape else "scores that are not finite"
        )
        raise UsageError(f"scores of {weight.name!r}: {found}; expected one finite number for each element")
    keys = (scores + np.float32(0)).view(np.uint32)  # -0.0 ranks as 0.0
    negative = scores < 0
    np.invert(keys, out=keys, where=negative)
    np.bitwise_or(keys, np.uint32(1 << 31), out=keys, where=~negative)
    keys[weight.zeros(stored)] = 0
    return keys


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
    padded = np.pad(keys.reshape(-1)[lines], ((0, 0), (0, -size % length)))
    stretches = padded.reshape(len(lines), -1, length)
    order = np.argsort(stretches, axis=-1, kind="stable")
    gone = np.zeros(stretches.shape, bool)
    if size % length:
        order[:, -1] = _filling_first(order[:, -1], size % length)
    np.put_along_axis(gone, order[..., :count], True, axis=-1)
    result = np.zeros(keys.size, bool)
    result[lines.reshape(-1)] = gone.reshape(len(lines), -1)[:, :size].reshape(-1)
    return result.reshape(keys.shape)


def _filling_first(order: np.ndarray, real: int) -> np.ndarray:
    """An order of elements in which those behind the first `real` ones come first."""
    again = np.argsort(order < real, axis=-1, kind="stable")
    return np.take_along_axis(order, again, axis=-1)


def _slabs(keys: np.ndarray) -> Iterator[np.ndarray]:
    flat = keys.reshape(-1)
    return (flat[start : start + _SLAB] for start in range(0, flat.size, _SLAB))
