"""Which channels go: those of the least score, until the budget is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.pruning.structure import Structure
from onnxopt.rewrite import Declined

__all__ = ["Budget", "select"]

_ROUNDING = 1e-9
"""What shares may be off by: 1 - 0.9 is less than one tenth."""


@dataclass(frozen=True)
class Budget:
    """What is to be left: exactly one of the first three.

    macs, parameters: fraction of the whole that is kept, at most. ratio: fraction of all channels that goes,
    of those that can. multiple: of so many elements is what a group keeps along an axis, where the budget can
    be met so. least: fraction of a group's channels that stays at least; one channel always does.
    """

    macs: float | None = None
    parameters: float | None = None
    ratio: float | None = None
    multiple: int = 1
    least: float = 0.1

    def __post_init__(self) -> None:
        given = {n: v for n in ("macs", "parameters", "ratio") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise UsageError(f"prune-channels: {' and '.join(given)} both say how much: give one of them")
        ((name, share),) = given.items()
        if not 0 < share < 1:
            raise UsageError(f"prune-channels: {name} is {share:g}; expected a fraction between 0 and 1")
        if self.multiple < 1 or not 0 <= self.least <= 1:
            found = f"multiple={self.multiple} and least={self.least:g}"
            raise UsageError(
                f"prune-channels: expected a multiple of at least 1 and a fraction, found {found}"
            )


def select(
    structure: Structure, scores: Sequence[np.ndarray], budget: Budget, fixed: Sequence[bool] | None = None
) -> np.ndarray:
    """The channels that go, bool [channels of the structure].

    Channels of all groups stand in one line by their score. From its start so many are taken that the
    budget is just met, where each group keeps its least number, rounded up to the multiple; the costs are
    those of all layers at the sizes that are left. Of what the last multiples took too much, the channels
    that matter most come back. Where multiples do not meet the budget, smaller ones do: the budget wins.

    Args:
        structure: of a model.
        scores: of each group's channels, float [channels]; those of -inf go, whatever the budget.
        budget: what is to be left.
        fixed: whether each group keeps all its channels.

    Raises:
        Declined: the budget cannot be met, or there are no channels to cut.
    """
    line = _Line(structure, scores, budget, fixed or [False] * len(structure.groups))
    multiple = budget.multiple
    while multiple:
        kept = line.longest(multiple)
        if kept is not None:
            return line.gone(line.filled(kept, multiple))
        multiple //= 2
    raise Declined(line.complaint())


class _Line:
    """The channels by their score; what a group keeps is said by a number."""

    def __init__(
        self, structure: Structure, scores: Sequence[np.ndarray], budget: Budget, fixed: Sequence[bool]
    ) -> None:
        self._structure, self._budget = structure, budget
        self._groups = [group for group, stays in zip(structure.groups, fixed, strict=True) if not stays]
        self._scores = [np.asarray(one) for one, stays in zip(scores, fixed, strict=True) if not stays]
        self._orders = [np.argsort(one, kind="stable") for one in self._scores]
        self._every = np.sort(np.concatenate(self._scores)) if self._scores else np.zeros(0)
        self._sorted = [one[order] for one, order in zip(self._scores, self._orders, strict=True)]
        self._most = [len(one) - int(np.searchsorted(one, -math.inf, "right")) for one in self._sorted]

    def longest(self, multiple: int) -> list[int] | None:
        """How many channels each group keeps if as few as can be go; None where the budget is not met."""
        low, high = 0, len(self._every)
        if not self._is_met(self._without(high, multiple)):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._is_met(self._without(middle, multiple)):
                high = middle
            else:
                low = middle + 1
        return self._without(low, multiple)

    def filled(self, kept: list[int], multiple: int) -> list[int]:
        """Blocks come back, those that matter most first, as long as the budget holds."""
        best = sorted(range(len(kept)), key=lambda n: -self._next(n, kept[n]))
        for n in best:
            more = list(kept)
            more[n] = self._rounded_one(n, kept[n] + 1, multiple)
            if more[n] > kept[n] and self._is_met(more):
                kept = more
        return kept

    def _next(self, n: int, kept: int) -> float:
        """The score of the best channel that a group loses."""
        return float(self._sorted[n][-kept - 1]) if kept < len(self._sorted[n]) else -math.inf

    def _without(self, count: int, multiple: int) -> list[int]:
        """What is kept without the first so many in the line."""
        if count == 0:
            return self._most
        last = self._every[count - 1]
        return self._rounded(
            [len(one) - int(np.searchsorted(one, last, "right")) for one in self._sorted], multiple
        )

    def _rounded(self, kept: Sequence[int], multiple: int) -> list[int]:
        return [self._rounded_one(n, one, multiple) for n, one in enumerate(kept)]

    def _rounded_one(self, n: int, kept: int, multiple: int) -> int:
        """Up to the multiple of elements, of which a channel has one or more along an axis."""
        size, most = len(self._orders[n]), self._most[n]
        step = multiple // math.gcd(multiple, self._groups[n].width)
        up = -(-max(kept, math.ceil(size * self._budget.least - _ROUNDING), 1) // step) * step
        return up if up <= most else most if most in (size, most % step) else most - most % step

    def gone(self, kept: Sequence[int]) -> np.ndarray:
        """The channels that go where groups keep so many."""
        found = np.zeros(len(self._structure.solution.pinned), bool)
        for group, order, count in zip(self._groups, self._orders, kept, strict=True):
            found[group.channels[order[: len(order) - count]]] = True
        return found

    def _share(self, kept: Sequence[int]) -> tuple[float, float]:
        """What is left of the amount that is limited, and its limit."""
        s, b, gone = self._structure, self._budget, self.gone(kept)
        if b.macs is not None:
            return s.macs(gone) / max(s.macs(), 1.0), b.macs
        if b.ratio is not None:
            return sum(kept) / max(len(self._every), 1), 1 - b.ratio
        assert b.parameters is not None  # or there would be no limit
        return s.parameters(gone) / max(s.parameters(), 1.0), b.parameters

    def _is_met(self, kept: Sequence[int]) -> bool:
        share, limit = self._share(kept)
        return share <= limit + _ROUNDING

    def complaint(self) -> str:
        """Why there is no choice."""
        if not self._groups:
            return "no channels can be cut"
        share, limit = self._share(self._without(len(self._every), 1))
        names = {"macs": "multiply-accumulates", "parameters": "parameters", "ratio": "channels"}
        what = next(name for key, name in names.items() if getattr(self._budget, key) is not None)
        return f"{limit:g} of the {what} cannot be reached: {share:.3f} is left at the least of all groups"
