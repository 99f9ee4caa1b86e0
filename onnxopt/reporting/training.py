"""The report of one training: what was asked, how it went, and whether the model is better for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from onnxopt.benchmarking.settings import Setting
from onnxopt.reporting.report import Size

__all__ = ["SCHEMA", "Score", "TrainingReport", "plain"]

SCHEMA = "onnxopt.train/1"
"""Name and version of the layout of `TrainingReport.to_dict`."""


@dataclass(frozen=True)
class Score:
    """The metric before and after, in ONNX Runtime. unseen: on samples by which nothing was chosen.

    start: that of the model that was trained, before it was, where it is another one than `before` is of.
    """

    metric: str
    before: float
    after: float
    unseen: bool
    start: float | None = None

    @property
    def summary(self) -> str:
        """``accuracy 0.91 before, 0.98 after``"""
        start = "" if self.start is None else f"{self.start:.6g} at the start, "
        return f"{self.metric} {self.before:.6g} before, {start}{self.after:.6g} after"


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    recipe: all options. samples: to train on, to choose the best epoch by, and for the last word; None where
    they are not counted. trained: parameters that were, of how many. choice: the score that the epoch was
    chosen by; final: that of the last word. curves: a number for each evaluation, which is one after each
    epoch unless the recipe says otherwise. best_epoch: number of the best one, counts from 1; 0: none is
    better than the start.
    reason: why nothing is to be written; empty where all is well. process: number of this one, of how many.
    """

    command: str
    source: str
    input_sha256: str
    recipe: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    device: str
    process: tuple[int, int]
    samples: tuple[int | None, int | None, int | None]
    trained: tuple[int, int]
    before: Size
    after: Size
    choice: Score
    final: Score
    curves: Mapping[str, Sequence[float]]
    best_epoch: int
    steps: int
    reason: str
    notes: tuple[str, ...]
    seconds: float
    settings: ClassVar[tuple[Setting, ...]] = ()
    session: ClassVar[Mapping[str, Any]] = {}

    @property
    def ok(self) -> bool:
        """Whether the model is as good as was asked."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has; laid out as docs/report.md says."""
        return {"schema": SCHEMA, "ok": self.ok, **plain(asdict(self))}


def plain(value: Any) -> Any:
    """Nested values as JSON has them: infinities and NaN are the strings "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
