"""How many samples a step sees: fixed, random, grown by a schedule, or all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.training.schedules import Clock, Schedule

__all__ = ["Sizes", "parse_sizes"]


@dataclass(frozen=True)
class Sizes:
    """How many samples a step sees: from `low` to `high`, drawn at random, times a schedule over epochs.

    None: all of them.
    """

    low: int
    high: int
    schedule: Schedule
    seed: int

    def of_epoch(self, epoch: int, epochs: int, count: int | None) -> Iterator[int]:
        """The size of each batch of an epoch; `count` is that of all samples, None where it is not known."""
        random = np.random.default_rng((self.seed, epoch, 1))
        factor = self.schedule(Clock(step=epoch, total=epochs, epoch=epoch))
        left = count
        while left is None or left > 0:
            drawn = int(random.integers(self.low, self.high + 1)) if self.low < self.high else self.low
            size = max(round(drawn * factor), 1) if drawn else (left or 1)
            yield size if left is None else min(size, left)
            left = None if left is None else left - size


def parse_sizes(text: str | int, schedule: Schedule, seed: int) -> Sizes:
    """``32``, ``16-64`` (random), ``full``. Raises UsageError."""
    low, dash, high = str(text).partition("-")
    if text == "full":
        return Sizes(0, 0, schedule, seed)
    if not low.isdigit() or (dash and not high.isdigit()) or not 0 < int(low) <= int(high or low):
        raise UsageError(f"batch_size {text!r}: expected a number, a range such as 16-64, or full")
    return Sizes(int(low), int(high or low), schedule, seed)
