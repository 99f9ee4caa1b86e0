"""How a rate goes with time: learning rates, and whatever else starts at 1 and changes.

A schedule is a pure function of the clock, so that a resumed run goes on exactly as it would have.
Time t counts optimizer steps from 0, T is their number, e the epochs done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxopt.errors import UsageError
from onnxopt.recipe import parse_spelled

__all__ = ["SCHEDULES", "Clock", "Schedule", "parse_schedule"]


@dataclass(frozen=True)
class Clock:
    """Where a training is: steps done, steps in all (0: unknown), epochs done, and their scores so far."""

    step: int = 0
    total: int = 0
    epoch: int = 0
    scores: Sequence[float] = ()

    @property
    def share(self) -> float:
        """t/T, at most 1."""
        return min(self.step / max(self.total, 1), 1.0)


Schedule = Callable[[Clock], float]


@dataclass(frozen=True)
class Constant:
    """1"""

    def __call__(self, at: Clock) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """end + (1 - end) (1 - t/T)^power; power 3 is the cubic schedule of gradual pruning (1710.01878)."""

    end: float = 0.0
    power: float = 1.0

    def __call__(self, at: Clock) -> float:
        return float(self.end + (1 - self.end) * (1 - at.share) ** self.power)


@dataclass(frozen=True)
class Cosine:
    """end + (1 - end) (1 + cos(pi t/T)) / 2 (SGDR, 1608.03983)."""

    end: float = 0.0

    def __call__(self, at: Clock) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * at.share)) / 2


@dataclass(frozen=True)
class Exponential:
    """gamma^e"""

    gamma: float = 0.9

    def __call__(self, at: Clock) -> float:
        return self.gamma**at.epoch


@dataclass(frozen=True)
class Step:
    """gamma^floor(e / every)"""

    every: int = 10
    gamma: float = 0.1

    def __call__(self, at: Clock) -> float:
        return float(self.gamma ** (at.epoch // self.every))


@dataclass(frozen=True)
class Cyclic:
    """From `low` up to 1 and back in `period` steps, a triangle (1506.01186)."""

    period: int = 1000
    low: float = 0.1

    def __call__(self, at: Clock) -> float:
        phase = at.step % self.period / self.period
        return self.low + (1 - self.low) * (1 - abs(2 * phase - 1))


@dataclass(frozen=True)
class InverseSqrt:
    """(1 + delta t)^(-power/2)"""

    delta: float = 0.01
    power: float = 1.0

    def __call__(self, at: Clock) -> float:
        return float((1 + self.delta * at.step) ** (-self.power / 2))


@dataclass(frozen=True)
class Plateau:
    """Times `factor` whenever the score has not risen by `threshold` for `patience` epochs."""

    factor: float = 0.1
    patience: int = 3
    threshold: float = 1e-4

    def __call__(self, at: Clock) -> float:
        rate, best, waited = 1.0, -math.inf, 0
        for score in at.scores:
            best, waited = (score, 0) if score > best + self.threshold else (best, waited + 1)
            if waited > self.patience:
                rate, waited = rate * self.factor, 0
        return rate


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "cyclic": Cyclic,
    "exponential": Exponential,
    "inverse-sqrt": InverseSqrt,
    "linear": Linear,
    "plateau": Plateau,
    "step": Step,
}


def parse_schedule(text: str, warmup: int = 0) -> Schedule:
    """The schedule of that spelling; in front of it `warmup` steps of a linear rise, which are not in its t.

    Raises:
        UsageError: unknown, or with a wrong option.
    """
    schedule = parse_spelled(text, SCHEDULES, "schedule")
    if min(getattr(schedule, "period", 1), getattr(schedule, "every", 1)) < 1 or warmup < 0:
        raise UsageError(f"schedule {text}: period and every are at least 1, and warmup is not negative")
    if not all(value >= 0 for value in vars(schedule).values()):
        raise UsageError(f"schedule {text}: an option is less than 0")

    def warmed(at: Clock) -> float:
        if at.step < warmup:
            return (at.step + 1) / warmup
        return schedule(replace(at, step=at.step - warmup, total=max(at.total - warmup, 0)))

    return warmed if warmup else schedule
