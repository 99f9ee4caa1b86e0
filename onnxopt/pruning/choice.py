"""Which elements of weights go: so many, or those below a magnitude, compared within a layer or over all."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.evaluation import CannotEvaluateError
from onnxopt.pruning.saliency import Cut, Score, Scored, least_of_lines
from onnxopt.pruning.weights import StoredWeight

__all__ = ["Choice", "require_fit"]


_HELD = 1 << 25
"""Scores that are held at once, 4 bytes each; of more they are computed anew, one weight after the other."""


@dataclass(frozen=True)
class Choice:
    """How many elements go, and among which they are compared.

    share: of zeros among those that are compared; what is zero already goes first.
    exact: so many to the element, the first ones of equal scores; else those below the score where the share
        ends. threshold: instead, of a smaller magnitude.
    pattern: (N, M): instead, all but N of each M input channels, wherever `scope` says.
    """

    share: float = 0.5
    exact: bool = True
    threshold: float | None = None
    pattern: tuple[int, int] | None = None
    scope: Literal["layer", "global", "row"] = "layer"

    def gone(
        self, weights: Sequence[StoredWeight], score: Score
    ) -> Iterator[tuple[StoredWeight, np.ndarray]]:
        """Each weight with a bool array of its shape, True where an element goes."""
        if self.threshold is not None:
            for one in weights:
                parts = (np.abs(one.numbers(part)) < self.threshold for part in one.parts())
                yield one, np.concatenate([part.reshape(-1) for part in parts]).reshape(one.shape)
        elif self.pattern is not None or self.scope == "row":
            for one in weights:
                yield one, self._in_lines(one, score)
        elif self.scope == "global":
            yield from self._below(weights, score)
        else:
            for one in weights:
                yield from self._below([one], score)

    def why_not(self, weight: StoredWeight) -> str:
        """Why a weight cannot be pruned so, in words that follow "the weight"; empty where it can."""
        if self.levels_needed and weight.levels is not None and weight.levels.scale is None:
            return "has no scale of its own to compare its elements with others by"
        if self.pattern is None and self.scope != "row":
            return ""
        try:
            lines = weight.lines("inputs" if self.pattern else "summands")
        except CannotEvaluateError as error:
            return str(error)
        if self.pattern is not None and lines.shape[1] < self.pattern[1]:
            return f"has {lines.shape[1]} input channels, fewer than the pattern is long"
        return ""

    @property
    def levels_needed(self) -> bool:
        """Whether elements are compared with others than those of their own weight."""
        return self.threshold is not None or (self.scope == "global" and self.pattern is None)

    def _below(
        self, weights: Sequence[StoredWeight], score: Score
    ) -> Iterator[tuple[StoredWeight, np.ndarray]]:
        """The least of all these weights together."""

        total = sum(one.size for one in weights)
        scored = [Scored.of(one, score) for one in weights]
        keys: Callable[[Scored], Iterable[np.ndarray]] = Scored.ranks
        if not all(one.apart for one in scored) and (total <= _HELD or len(weights) == 1):
            keys = functools.cache(lambda one: tuple(one.ranks()))
        count = round(self.share * total) + (not self.exact)
        cut = Cut.at(lambda: itertools.chain.from_iterable(map(keys, scored)), count)
        if not self.exact:
            cut.ties = 0
        for one in scored:
            gone = np.concatenate([cut.take(part).reshape(-1) for part in keys(one)])
            yield one.weight, gone.reshape(one.weight.shape)

    def _in_lines(self, weight: StoredWeight, score: Score) -> np.ndarray:
        keys = np.concatenate([part.reshape(-1) for part in Scored.of(weight, score).ranks()])
        keys = keys.reshape(weight.shape)
        if self.pattern is None:
            lines = weight.lines("summands")
            return least_of_lines(keys, lines, round(self.share * lines.shape[1]))
        kept, length = self.pattern
        return least_of_lines(keys, weight.lines("inputs"), length - kept, length)


def require_fit(weights: Sequence[StoredWeight], masks: Mapping[str, np.ndarray]) -> None:
    """Raises UsageError: a mask for none of the weights, or of another shape."""
    known = {one.name: one for one in weights}
    for name, mask in masks.items():
        if name not in known:
            raise UsageError(f"masks: the model has no weight {name!r}{did_you_mean(name, known)}")
        if np.shape(mask) != known[name].shape:
            found = f"mask of shape {list(np.shape(mask))}"
            raise UsageError(f"masks: {name!r} has the shape {list(known[name].shape)}; found a {found}")
