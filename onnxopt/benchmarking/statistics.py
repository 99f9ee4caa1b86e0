"""Medians of paired samples, with intervals that know samples of one session are not independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a ratio: ``1.002x [0.998, 1.006]``."""
        return f"{self.value:.3f}x [{self.low:.3f}, {self.high:.3f}]"


def estimate(logs: npt.NDArray[Any], *, seed: int, resamples: int = 2000) -> list[Estimate]:
    """One estimate for each column of `logs`, natural logarithms of shape (repeats, rounds, columns).

    The median runs over all rounds of all repeats. Two sessions of one model differ by up to 1.3 %, and every
    round of a repeat shares that difference, so the bootstrap draws repeats first and then rounds within each
    (Davison and Hinkley, Bootstrap Methods and their Application, section 3.8).
    """
    rng = np.random.default_rng(seed)
    repeats, rounds, columns = logs.shape
    medians = np.empty((resamples, columns))
    for row in medians:
        chosen = rng.integers(repeats, size=(repeats, 1))
        row[:] = np.median(logs[chosen, rng.integers(rounds, size=(repeats, rounds))], axis=(0, 1))
    values = np.exp(np.median(logs, axis=(0, 1)))
    lows, highs = np.exp(np.quantile(medians, (0.025, 0.975), axis=0))
    return [Estimate(*map(float, figures)) for figures in zip(values, lows, highs, strict=True)]
