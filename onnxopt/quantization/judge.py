"""Whether a quantized model is good enough, judged on samples that nothing was fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.emulation import find_isa, open_emulated
from onnxopt.metric import Budget, Metric, Run
from onnxopt.model import ModelLike
from onnxopt.runtimes import open_session
from onnxopt.verification.distance import Distance

__all__ = ["LEAST_AGREEMENT", "LEAST_DB", "Judge", "Judgement"]

LEAST_DB = 25.0
"""SQNR that each float output has to keep where the user gives no metric."""
LEAST_AGREEMENT = 0.98
"""Share of elements of other outputs, such as labels, that have to stay the same there."""


@dataclass(frozen=True)
class Judgement:
    """What a candidate keeps.

    score: the user's metric, or the margin in dB of the output nearest to its bound. before: the original's
    score; None without a metric. summary: one line. elsewhere: instruction set -> the same on its emulated
    CPU. ok: within the budget, here and there.
    """

    within: bool
    score: float
    before: float | None
    summary: str
    elsewhere: Mapping[str, Judgement] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the budget is kept, elsewhere too."""
        return self.within and all(other.ok for other in self.elsewhere.values())

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {
            "ok": self.ok,
            "score": self.score if math.isfinite(self.score) else str(self.score),
            "before": self.before,
            "summary": self.summary,
            "elsewhere": {name: other.to_dict() for name, other in self.elsewhere.items()},
        }


class Judge:
    """Judges candidates for one original, by the user's metric or by how near their outputs stay.

    isas: on whose emulated CPUs candidates are judged, too. session_config: that candidates run with.
    """

    def __init__(
        self,
        original: ModelLike,
        samples: Sequence[Feeds],
        metric: Metric | None,
        budget: Budget | None,
        isas: Sequence[str] = (),
        session_config: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._session_config = dict(session_config)
        self._samples, self._metric, self._budget, self._isas = samples, metric, budget, isas
        for isa in isas:
            find_isa(isa)
        with open_session(original) as session:
            self._before = metric(session.run) if metric is not None else None
            self._expected = [] if metric is not None else [session.run(feeds) for feeds in samples]

    def __call__(
        self, model: ir.Model, session_config: Mapping[str, str] = MappingProxyType({})
    ) -> Judgement:
        """Judge a candidate here, and where it keeps the budget on the other instruction sets, too.

        session_config: more settings of its sessions here.
        """
        config = {**self._session_config, **session_config}
        with open_session(model, session_config=config) as session:
            found = self._judged(session.run)
        if not found.within:
            return found
        return replace(found, elsewhere={isa: self.on(model, isa) for isa in self._isas})

    @property
    def by_outputs(self) -> bool:
        """Whether it judges by how near outputs stay on its samples, not by a metric of the user's."""
        return self._metric is None

    def on(self, model: ir.Model, isa: str) -> Judgement:
        """Judge a candidate on an emulated CPU of that instruction set."""
        with open_emulated(model, isa=isa, session_config=self._session_config) as emulated:
            return self._judged(emulated.run)

    def _judged(self, run: Run) -> Judgement:
        if self._metric is None or self._budget is None or self._before is None:
            return self._by_outputs(run)
        score = self._metric(run)
        text = f"{self._metric.name} {self._before:.4g} before, {score:.4g} after, {self._budget} may be lost"
        return Judgement(self._budget.allows(self._before, score), score, self._before, text)

    def _by_outputs(self, run: Run) -> Judgement:
        found: dict[str, Distance] = {}
        for feeds, expected in zip(self._samples, self._expected, strict=True):
            outputs = run(feeds)
            for name, value in expected.items():
                found.setdefault(name, Distance()).add(value, outputs[name])
        margins = {name: _margin(one) for name, one in found.items()}
        worst = min(margins, key=lambda name: margins[name])
        return Judgement(margins[worst] >= 0, margins[worst], None, _told(worst, found, len(self._samples)))


def _margin(distance: Distance) -> float:
    if distance.float_type:
        return distance.sqnr - LEAST_DB
    return (1 - distance.mismatch - LEAST_AGREEMENT) * 100


def _told(worst: str, found: Mapping[str, Distance], samples: int) -> str:
    distance = found[worst]
    if not distance.float_type:
        kept = f"{1 - distance.mismatch:.1%} of output {worst!r} the same, {LEAST_AGREEMENT:.0%} needed"
    else:
        kept = f"SQNR {distance.sqnr:.1f} dB of output {worst!r}, {LEAST_DB:g} dB needed"
    top1 = f", same top-1 {distance.top1:.1%}" if distance.top1 is not None else ""
    return f"{kept}{top1}, on {samples} held-out samples"
