"""Which channels go: those of the least score, until the budget is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.pruning.structure import Group, Structure

__all__ = ["Budget", "select"]


@dataclass(frozen=True)
class Budget:
    """What is to be left: exactly one of the three.

    macs, parameters: fraction of the whole that is kept. ratio: fraction of each group's channels that goes.
    multiple: channels of a group that stay are a multiple of this, where the budget can be met so.
    least: fraction of a group's channels that stays at least; one channel always does.
    keep: patterns of names of layers whose groups keep all channels.
    """

    macs: float | None = None
    parameters: float | None = None
    ratio: float | None = None
    multiple: int = 1
    least: float = 0.1
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = {n: v for n in ("macs", "parameters", "ratio") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise UsageError(f"prune-channels: give one of macs, parameters and ratio; found {found}")
        ((name, share),) = given.items()
        if not 0 < share < 1:
            raise UsageError(f"prune-channels: {name} is {share:g}; a fraction between 0 and 1 was expected")
        if self.multiple < 1 or not 0 <= self.least <= 1:
            raise UsageError(
                f"prune-channels: multiple is {self.multiple}, least {self.least:g}; at least 1, and a fraction"
            )

    def keeps(self, group: Group) -> bool:
        """Whether a pattern names one of the layers that write a group's channels."""
        return any(fnmatchcase(name, pattern) for name in group.layers for pattern in self.keep)


def select(structure: Structure, scores: Sequence[np.ndarray], budget: Budget) -> np.ndarray:
    """The channels that go, bool [channels of the structure].

    Channels of all groups stand in one line by their score. From its start so many are taken that the
    budget is just met, where each group keeps its least number, rounded up to the multiple; the costs are
    those of all layers at the sizes that are left. Where multiples do not meet the budget, smaller ones
    are tried: the budget wins.

    Raises:
        UsageError: the budget cannot be met with the least that groups keep.
    """
    line = _Line(structure, scores, budget)
    multiple = budget.multiple
    while True:
        found = line.shortest(multiple)
        if found is not None:
            return found
        if multiple == 1:
            raise UsageError(f"prune-channels: {line.complaint()}")
        multiple //= 2


class _Line:
    def __init__(self, structure: Structure, scores: Sequence[np.ndarray], budget: Budget) -> None:
        self._structure, self._budget = structure, budget
        self._groups = [n for n, group in enumerate(structure.groups) if not budget.keeps(group)]
        self._orders = [np.argsort(scores[n], kind="stable") for n in self._groups]
        sizes = [len(order) for order in self._orders]
        every = [np.sort(scores[n]) for n in self._groups]
        flat = np.concatenate(every) if every else np.zeros(0)
        place = np.empty(len(flat), np.int64)
        place[np.argsort(flat, kind="stable")] = np.arange(len(flat))
        self._places = np.split(place, np.cumsum(sizes)[:-1]) if every else []
        self._length = len(flat)

    def shortest(self, multiple: int) -> np.ndarray | None:
        """What goes if as few as can be go; None where the budget is not met."""
        if self._budget.ratio is not None:
            return self._gone([math.floor(len(one) * self._budget.ratio) for one in self._orders], multiple)
        low, high = 0, self._length
        if not self._is_met(self._first(high, multiple)):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._is_met(self._first(middle, multiple)):
                high = middle
            else:
                low = middle + 1
        return self._first(low, multiple)

    def _first(self, count: int, multiple: int) -> np.ndarray:
        """What goes of the first so many in the line."""
        return self._gone([int(np.searchsorted(places, count)) for places in self._places], multiple)

    def _gone(self, counts: Sequence[int], multiple: int) -> np.ndarray:
        gone = np.zeros(len(self._structure.solution.pinned), bool)
        for n, order, count in zip(self._groups, self._orders, counts, strict=True):
            kept = max(len(order) - count, math.ceil(len(order) * self._budget.least), 1)
            kept = min(-(-kept // multiple) * multiple, len(order))
            gone[self._structure.groups[n].channels[order[: len(order) - kept]]] = True
        return gone

    def _share(self, gone: np.ndarray) -> tuple[float, float]:
        """What is left of the amount that is limited, and its limit."""
        s, b = self._structure, self._budget
        if b.macs is not None:
            return s.macs(gone) / max(s.macs(), 1.0), b.macs
        assert b.parameters is not None
        return s.parameters(gone) / max(s.parameters(), 1.0), b.parameters

    def _is_met(self, gone: np.ndarray) -> bool:
        share, limit = self._share(gone)
        return share <= limit

    def complaint(self) -> str:
        share, limit = self._share(self._first(self._length, 1))
        what = "multiply-accumulates" if self._budget.macs is not None else "parameters"
        return f"{limit:g} of the {what} is less than can be reached: with all groups at their least, {share:.3f}"
