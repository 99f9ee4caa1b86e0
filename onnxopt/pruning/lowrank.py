"""Weights as products of two smaller ones.

A weight W of a convolution is a matrix in as many ways as there are sets F of its kernel's axes: one row for
each input channel and place along F, one column for each output channel and place along the other axes. A
product U V of rank r near that matrix is two convolutions, the first with the kernel along F, the second with
the rest. F of all axes is a k x k convolution to r channels and a 1 x 1 one (Zhang et al., "Accelerating Very
Deep Convolutional Networks for Classification and Detection", 2016), F of one of two axes is k x 1 and 1 x k
(Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014), and a matrix,
which has no kernel, is the truncated singular value decomposition.

With the covariance M of what the weight is multiplied with, it is the error of the outputs that is least, up
to a constant that the bias makes up for: the decomposition is that of L' W, L L' = M (Zhang et al.; Chen et
al., "DRONE: Data-aware Low-rank Compression for Large NLP Models", 2021; Wang et al., "SVD-LLM", 2024). That
is exact for F of all axes; for others M is averaged over the places that are not along F, and what is lost is
still counted by M itself.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np

__all__ = ["WORTH", "Decomposition", "Factors", "Spread", "best_factors", "decompositions"]

WORTH = Fraction(9, 10)
"""What two layers may take of the multiply-adds of one. On a CPU, convolutions with 3 to 116 million of them
took 0.95 to 1.23 of the time with 0.95 of the multiply-adds, 0.55 to 1.12 with 0.84, 0.47 to 1.1 with 0.5."""
_DAMPING = 0.01
"""Share of the mean variance that is added to all: what samples lack may still come."""
_ROUNDING = 1e-12
"""Share of the energy that products rounded to float32 lack anyway."""
_TINY = float(np.finfo(np.float32).tiny)

Spread = Sequence[Fraction | None]
"""Of each axis of a kernel, the input's extent over the output's; None where it is not known."""


@dataclass(frozen=True)
class Factors:
    """A weight as two. The bias goes with the second.

    along: of each axis of the kernel, whether it is the first's. first: float64 [rank, inputs, *kernel].
    second: float64 [outputs, rank, *kernel]. shift: float64 [outputs],
    what the outputs lose on average; None: not known.
    """

    along: tuple[bool, ...]
    first: np.ndarray
    second: np.ndarray
    shift: np.ndarray | None


@dataclass(frozen=True)
class Decomposition:
    """A weight, seen as one matrix, with singular vectors.

    weight: float64 [outputs, inputs, *kernel]. along: the axes F. spread: as `decompositions` takes it.
    covariance: float64 [summands, summands], in the order of `weight[0]`; None: that of white noise.
    mean: float64 [summands]; None: not known.
    """

    weight: np.ndarray
    along: tuple[bool, ...]
    spread: Spread
    covariance: np.ndarray | None = None
    mean: np.ndarray | None = None
    _kept: dict[int, float] = field(default_factory=dict, repr=False)

    @cached_property
    def share(self) -> Fraction:
        """Of the layer's multiply-adds, what each rank takes."""
        outputs, inputs, *kernel = self.weight.shape
        first, second = Fraction(inputs), Fraction(outputs)
        for size, early, ratio in zip(kernel, self.along, self.spread, strict=True):
            if early:
                first *= size
            else:
                assert ratio is not None  # else it is not listed
                first, second = first * ratio, second * size
        return (first + second) / self.weight.size

    @property
    def most(self) -> int:
        """The largest rank that is worth it, or that there is."""
        return min(int(WORTH / self.share), self._height, self.weight.size // self._height)

    def rank(self, energy: float, multiple: int) -> int | None:
        """The least rank that keeps so much, or a multiple where that still saves; None: none saves."""
        most, energy = self.most, min(energy, 1 - _ROUNDING)
        if most < 1 or self.kept(most) < energy:
            return None
        rank = 1 + bisect_left(range(1, most), energy, key=self.kept)
        wide = -(-rank // multiple) * multiple
        return wide if wide <= most else rank

    def kept(self, rank: int) -> float:
        """The share of the outputs' energy, or with no covariance of the weight's, that a rank keeps."""
        if self.covariance is None:
            return float(self._shares[min(rank, len(self._shares)) - 1])
        if rank not in self._kept:
            whole = _energy(self.weight, self.covariance)
            self._kept[rank] = 1 - _energy(self._lost(rank), self.covariance) / whole if whole else 1.0
        return self._kept[rank]

    def factors(self, rank: int) -> Factors:
        """The weight in this rank."""
        rows, columns, _ = self._parts
        outputs, inputs, *kernel = self.weight.shape
        early = [size if one else 1 for size, one in zip(kernel, self.along, strict=True)]
        late = [1 if one else size for size, one in zip(kernel, self.along, strict=True)]
        first = rows[:, :rank].T.reshape(rank, inputs, *early)
        second = columns[:rank].reshape(rank, outputs, *late).swapaxes(0, 1)
        shift = None if self.mean is None else self._lost(rank).reshape(outputs, -1) @ self.mean
        return Factors(self.along, first, second, shift)

    def _lost(self, rank: int) -> np.ndarray:
        rows, columns, _ = self._parts
        product = (rows[:, :rank] @ columns[:rank]).reshape([self.weight.shape[axis] for axis in self._order])
        lost: np.ndarray = self.weight - product.transpose(np.argsort(self._order))
        return lost

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """Axes of the weight in the order inputs, F, outputs, the rest of the kernel."""
        early = [axis for axis, one in enumerate(self.along, 2) if one]
        late = [axis for axis, one in enumerate(self.along, 2) if not one]
        return (1, *early, 0, *late)

    @property
    def _height(self) -> int:
        inputs, *kernel = self.weight.shape[1:]
        return int(inputs * math.prod(itertools.compress(kernel, self.along)))

    @property
    def _matrix(self) -> np.ndarray:
        return self.weight.transpose(self._order).reshape(self._height, -1)

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns whose product is the matrix, and the energy of each pair, the largest first.

        By the eigenvectors of the smaller of the two Gram matrices, which takes a fraction of the time.
        """
        matrix, root = self._matrix, self._root()
        seen = matrix if root is None else root.T @ matrix
        tall = seen.shape[0] > seen.shape[1]
        energy, basis = np.linalg.eigh(seen.T @ seen if tall else seen @ seen.T)
        energy, basis = energy[::-1].clip(0), basis[:, ::-1]
        if tall:
            return matrix @ basis, basis.T, energy
        return basis if root is None else np.linalg.solve(root.T, basis), basis.T @ seen, energy

    @cached_property
    def _shares(self) -> np.ndarray:
        """What each rank keeps, from one up."""
        sums: np.ndarray = np.cumsum(self._parts[2])
        return sums / sums[-1] if sums[-1] else np.ones(len(sums))

    def _root(self) -> np.ndarray | None:
        """The Cholesky factor of the covariance of what the rows are multiplied with."""
        if self.covariance is None:
            return None
        shape = self.weight.shape[1:]
        mine = [0, *(axis for axis, one in enumerate(self.along, 1) if one)]
        places = [axis for axis, one in enumerate(self.along, 1) if not one]
        order = (*mine, *places, *(axis + len(shape) for axis in (*mine, *places)))
        count = math.prod(shape[axis] for axis in mine)
        pairs = self.covariance.reshape(*shape, *shape).transpose(order)
        blocks = pairs.reshape(count, math.prod(shape) // count, count, -1)
        seen = np.einsum("apbp->ab", blocks)
        damping = _DAMPING * np.trace(seen) / count + _TINY
        return np.linalg.cholesky(seen + damping * np.eye(count))


def decompositions(
    weight: np.ndarray, spread: Spread, covariance: np.ndarray | None = None, mean: np.ndarray | None = None
) -> Iterator[Decomposition]:
    """The ways to write a weight as two, whose cost is known.

    Args:
        weight: float64 [outputs, inputs, *kernel].
        spread: of each axis of the kernel, the input's extent over the output's; None where it is not known.
        covariance: of what the weight is multiplied with, times any number.
        mean: of that.

    A stride goes with the first where the kernel does not care.
    """
    kernel = weight.shape[2:]
    for along in itertools.product((True, False), repeat=len(kernel)):
        sides = zip(along, kernel, spread, strict=True)
        if all(early or (size > 1 and ratio is not None) for early, size, ratio in sides):
            yield Decomposition(weight, along, spread, covariance, mean)


def best_factors(
    ways: Sequence[Decomposition], energy: float, multiple: int
) -> tuple[Decomposition, int] | None:
    """The way and rank that take the fewest multiply-adds and keep so much energy; None: none saves."""
    ranks = [way.rank(energy, multiple) for way in ways]
    found = [(ways[n].share * rank, n, rank) for n, rank in enumerate(ranks) if rank]
    if not found:
        return None
    _, number, rank = min(found)
    return ways[number], rank


def _energy(weight: np.ndarray, covariance: np.ndarray | None) -> float:
    rows = weight.reshape(len(weight), -1)
    return float(np.vdot(rows, rows if covariance is None else rows @ covariance))
