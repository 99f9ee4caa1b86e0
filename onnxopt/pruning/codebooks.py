"""Few numbers that stand for all elements of a weight.

Source: Han et al., "Deep Compression", 2016: k-means in one dimension, from centers that lie evenly between
the smallest and the largest element, which keeps the few large elements apart.
"""

from __future__ import annotations

import numpy as np

__all__ = ["codebook_of"]

_TURNS = 1000


def codebook_of(numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that elements share, and which of them each element has.

    Args:
        numbers: float32, finite, not empty.
        size: of the codebook, at most; 256 at most.

    Returns: float32 numbers, ascending but for a first 0 where any element is zero, which only these have;
        and uint8 of the shape of the elements. No more than `size` different elements stay as they are.
    """
    zero = numbers == 0
    some = int(zero.any())
    ordered = np.sort(numbers[~zero])
    centers = _centers(ordered, size - some)
    codes = np.asarray(np.searchsorted(_borders(centers), numbers), np.uint8) + np.uint8(some)
    if some:
        codes[zero] = 0
        centers = np.concatenate([np.zeros(1, np.float32), centers])
    return centers, codes


def _centers(ordered: np.ndarray, count: int) -> np.ndarray:
    """Centers of so many clusters, or fewer: Lloyd's algorithm, on ascending elements."""
    different = ordered[np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)]
    if len(different) <= count:
        return different
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    centers = np.linspace(ordered[0], ordered[-1], count)
    places = None
    for _ in range(_TURNS):
        now = np.concatenate([[0], np.searchsorted(ordered, _borders(centers)), [len(ordered)]])
        if places is not None and np.array_equal(now, places):
            break
        places, counts = now, np.diff(now)
        means = np.diff(sums[now]) / np.maximum(counts, 1)
        centers = np.where(counts > 0, means, centers)  # an empty one stays where it is
    return np.asarray(centers, np.float32)


def _borders(centers: np.ndarray) -> np.ndarray:
    """Halfway between neighbours; elements at a border belong to the lower one."""
    return np.asarray((centers[1:] + centers[:-1]) / 2, np.float32)
