"""What a measurement found, and the one word it allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from onnxopt.benchmarking.statistics import Estimate

__all__ = ["Clock", "Figures", "Timing", "Verdict"]

Clock = Literal["CPU time", "wall time"]
Verdict = Literal["faster", "slower", "no measurable difference"]

FLOOR = 0.01
"""Two fresh sessions of one model differ by up to 1.3 % (the memory they get), and some of
that remains after the median over repeats: no claim below it, however narrow the interval."""

DOUBTFUL_FLOOR = 0.03
"""The floor where the original strays from itself by more than `FLOOR`, or the samples are few."""

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Figures:
    """What one clock read: after against before, and the original against itself."""

    ratio: Estimate
    """After / before: 0.5 is twice as fast."""
    control: Estimate
    """A second session of the original / the first: 1 but for the noise."""
    before_ms: Estimate
    after_ms: Estimate


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Latency of two models, measured side by side. Times are milliseconds a run."""

    provider: str
    threads: int
    clock: Clock
    """The clock that the verdict reads: CPU time for one thread on the CPU, wall time otherwise."""
    cpu: Figures
    """CPU time: of the thread for one thread on the CPU, of the whole process otherwise."""
    wall: Figures
    open_before_ms: float
    """CPU time to create a session, median over repeats."""
    open_after_ms: float
    build_before_s: float | None
    """Wall seconds of the first session and runs, which build TensorRT's engine; None for other providers."""
    build_after_s: float | None
    repeats: int
    """Times that the sessions were created afresh."""
    rounds: int
    """Paired samples in a repeat."""
    batch: int
    """Runs in a sample."""
    seed: int
    session_config: Mapping[str, str]
    """Settings of the sessions of `after`; those of `before` have none."""
    runtime: str
    machine: str
    cores: int
    assignment_before: Mapping[str, int]
    """Nodes by execution provider, before the provider fuses them."""
    assignment_after: Mapping[str, int]
    load_average: tuple[float | None, float | None]
    """Over one minute, when the measurement began and when it ended."""

    @property
    def figures(self) -> Figures:
        """What the verdict's clock read."""
        return self.cpu if self.clock == "CPU time" else self.wall

    @property
    def ratio(self) -> float:
        return self.figures.ratio.value

    @property
    def interval(self) -> tuple[float, float]:
        return self.figures.ratio.low, self.figures.ratio.high

    @property
    def control_ratio(self) -> float:
        return self.figures.control.value

    @property
    def control_interval(self) -> tuple[float, float]:
        return self.figures.control.low, self.figures.control.high

    @property
    def before_ms(self) -> float:
        return self.figures.before_ms.value

    @property
    def after_ms(self) -> float:
        return self.figures.after_ms.value

    @property
    def few_samples(self) -> bool:
        """Fewer than 3 repeats of 3 rounds: the runs are too long for the seconds given."""
        return self.repeats < 3 or self.rounds < 3

    @property
    def blind_zone(self) -> tuple[float, float]:
        """The ratios that say nothing, symmetric about 1 in logarithms.

        It covers the control's interval, mirrored too, since what shifts the original against itself one way
        may shift any pair the other way; and a floor of 1 %, or 3 % where the control's ratio is further than
        1 % from 1 or the samples are few.
        """
        control = self.figures.control
        doubtful = self.few_samples or abs(math.log(control.value)) > math.log1p(FLOOR)
        floor = math.log1p(DOUBTFUL_FLOOR if doubtful else FLOOR)
        half = max(floor, abs(math.log(control.low)), abs(math.log(control.high)))
        return math.exp(-half), math.exp(half)

    @property
    def verdict(self) -> Verdict:
        """``faster`` or ``slower`` where the ratio's whole interval lies outside the blind zone."""
        low, high = self.blind_zone
        if self.figures.ratio.high < low:
            return "faster"
        if self.figures.ratio.low > high:
            return "slower"
        return "no measurable difference"

    @property
    def summary(self) -> str:
        """The result in one line."""
        figures = self.figures
        ratio, interval = str(figures.ratio).split(" ", 1)
        return (
            f"{self.verdict}: {ratio} {self.clock} {interval}, control {figures.control}, "
            f"{self.before_ms:.3g} ms before, {self.after_ms:.3g} ms after"
            + ("; with session settings" if self.session_config else "")
            + ("; few samples" if self.few_samples else "")
            + self._left_on_cpu
        )

    @property
    def _left_on_cpu(self) -> str:
        """``; 3 of 120 nodes on the CPU`` where another provider was asked for and left some."""
        nodes = self.assignment_after
        left = nodes.get(_CPU, 0)
        return (
            f"; {left} of {sum(nodes.values())} nodes on the CPU" if self.provider != "cpu" and left else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            **asdict(self),
            "load_average": list(self.load_average),
            "blind_zone": list(self.blind_zone),
            "few_samples": self.few_samples,
            "verdict": self.verdict,
            "summary": self.summary,
        }
