"""Whether a quantized model is good enough, judged on samples that nothing was fitted to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.emulation import open_emulated
from onnxopt.errors import UsageError
from onnxopt.metric import Budget, Metric, Run, Split, load_metric
from onnxopt.model import ModelLike, load
from onnxopt.quantization.bounds import required_db
from onnxopt.quantization.unrolled import STEPS, run_all, states_of
from onnxopt.runtimes import RunError, Session, UnsupportedModelError, open_session
from onnxopt.verification.distance import Distance

__all__ = ["LEAST_AGREEMENT", "Judge", "Judgement", "Judging"]

LEAST_AGREEMENT = 0.98
"""Share of elements of other outputs than floats, as labels, that stay the same where there is no metric."""
_NEAR = 2.0
"""dB, or percent of the elements, that are near the bound; of a metric, the budget once more."""


@dataclass(frozen=True)
class Judgement:
    """What a candidate keeps.

    within: the budget, here. score: the user's metric, or the margin in dB, or percent of the elements, of
    the output nearest to its bound. before: the original's score; None without a metric. summary: one line.
    near: beyond the budget by so little that what is left to try for accuracy may make up for it.
    unseen: on samples that no candidate was chosen by. elsewhere: instruction set -> the same on its emulated
    CPU.
    """

    within: bool
    score: float
    before: float | None
    summary: str
    unseen: bool = False
    near: bool = False
    elsewhere: Mapping[str, Judgement] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the budget is kept, elsewhere too."""
        return self.within and all(other.ok for other in self.elsewhere.values())

    @property
    def reason(self) -> str:
        """Why it is not kept: the summary of the first place where it is not."""
        if not self.within:
            return self.summary
        return next((f"on {isa}: {one.summary}" for isa, one in self.elsewhere.items() if not one.ok), "")

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {
            "ok": self.ok,
            "score": _plain(self.score),
            "before": None if self.before is None else _plain(self.before),
            "summary": self.summary,
            "unseen": self.unseen,
            "elsewhere": {name: other.to_dict() for name, other in self.elsewhere.items()},
        }


Judging = Callable[[ir.Model], Judgement]
"""What says of a candidate what it keeps."""


class Judge:
    """Judges candidates for one original, by the user's metric or by how near their outputs stay.

    Args:
        original: what candidates are compared with.
        samples: held out from calibration.
        metric: of `load_metric`; None: by `bounds.required_db` and LEAST_AGREEMENT.
        budget: what of the metric may be lost.
        isas: instruction sets on whose emulated CPUs the budget has to be kept, too.
        session_config: that candidates run with.

    Raises:
        UsageError: there is no such metric, it fails on the original, or that cannot run the samples.
    """

    def __init__(
        self,
        original: ModelLike,
        samples: Sequence[Feeds],
        metric: str | Callable[..., Any] | Metric | None = None,
        budget: Budget | None = None,
        isas: Sequence[str] = (),
        session_config: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._session_config = dict(session_config)
        self._samples, self._budget, self._isas = samples, budget or Budget(0.0), isas
        self._metric: Metric | None = None
        self._expected: list[dict[str, Any]] = []
        self._bounds: Mapping[str, float] = {}
        self._states: Mapping[str, str] = {}
        self._before: dict[Split, float] = {}
        with open_session(original) as session:
            if metric is None:
                self._expect(load(original), session)
                return
            self._metric = load_metric(metric, session.run, samples)
            splits: tuple[Split, ...] = ("search", "final") if self._metric.has_split else ("search",)
            self._before = {split: _score(self._metric, session, split) for split in splits}

    def _expect(self, original: ir.Model, session: Session) -> None:
        """Run the original; the first run tells bounds, and which outputs are state."""
        inputs = [value.name or "" for value in original.graph.inputs]
        try:
            outputs = session.run(self._samples[0])
            feeds = {name: self._samples[0][name] for name in inputs if name in self._samples[0]}
            self._states = states_of(feeds, outputs)
            self._bounds = required_db(original, feeds, outputs, self._states)
            for outputs in run_all(session.run, self._samples, self._states):
                self._expected.append(outputs)
        except RunError as error:
            number = len(self._expected) % len(self._samples)
            raise UsageError(f"the original model cannot run held-out sample {number}: {error}") from error

    def __call__(
        self, model: ir.Model, split: Split = "search", more: Mapping[str, str] = MappingProxyType({})
    ) -> Judgement:
        """Judge a candidate here, and where it keeps the budget on the other instruction sets, too.

        split: "final" for the last word, on what the metric keeps unseen if it does. more: settings of the
        sessions here. A candidate that the runtime here has no kernels for keeps nothing.
        """
        try:
            with open_session(model, session_config={**self._session_config, **more}) as session:
                found = self._judged(session.run, split)
        except UnsupportedModelError as error:
            return Judgement(False, -math.inf, None, f"its accuracy cannot be judged here: {error}")
        if not found.within:
            return found
        return replace(found, elsewhere={isa: self.on(model, isa, split) for isa in self._isas})

    @property
    def here(self) -> Judge:
        """The same judge, for the CPU here alone."""
        other = copy.copy(self)
        other._isas = ()
        return other

    @property
    def by_outputs(self) -> bool:
        """Whether it judges by how near outputs stay on its samples, not by a metric."""
        return self._metric is None

    def on(self, model: ir.Model, isa: str, split: Split = "search") -> Judgement:
        """Judge a candidate on an emulated CPU of that instruction set."""
        with open_emulated(model, isa=isa, session_config=self._session_config) as emulated:
            return self._judged(emulated.run, split)

    def _judged(self, run: Run, split: Split) -> Judgement:
        if self._metric is None:
            return self._by_outputs(run)
        unseen = split == "final" and split in self._before
        before, score = self._before[split if unseen else "search"], self._metric(run, split)
        name, drop = self._metric.name, self._budget
        within, twice = drop.allows(before, score), replace(drop, drop=2 * drop.drop)
        text = f"{name} {before:.4g} before, {score:.4g} after, {drop} may be lost"
        near = not within and twice.allows(before, score)
        return Judgement(within, score, before, text, unseen, near)

    def _by_outputs(self, run: Run) -> Judgement:
        found: dict[str, Distance] = {}
        runs = run_all(run, self._samples, self._states)
        for outputs, expected in zip(runs, self._expected, strict=True):
            for name, value in expected.items():
                found.setdefault(name, Distance(sliced=False)).add(value, outputs[name])
        margins = {name: _margin(one, self._bounds[name]) for name, one in found.items()}
        worst = min(margins, key=lambda name: margins[name])
        told = _told(worst, found[worst], self._bounds[worst])
        told += f", on {len(self._samples)} held-out samples"
        told += f", state carried over {STEPS} steps" if self._states else ""
        margin = margins[worst]
        return Judgement(margin >= 0, margin, None, told, near=-_NEAR <= margin < 0)


def _score(metric: Metric, session: Session, split: Split) -> float:
    """Of the original: where it cannot be run as the metric runs it, the metric is to blame."""
    try:
        return metric(session.run, split)
    except RunError as error:
        raise UsageError(f"metric {metric.name}: it failed on the original model: {error}") from error


def _margin(distance: Distance, bound: float) -> float:
    if distance.problems or distance.strays:
        return -math.inf
    if distance.float_type:
        return distance.sqnr - bound
    return (1 - distance.mismatch - LEAST_AGREEMENT) * 100


def _told(name: str, distance: Distance, bound: float) -> str:
    if distance.problems:
        return f"output {name!r} cannot be compared: {distance.problems[0]}"
    if distance.strays:
        return (
            f"{distance.strays} elements of output {name!r} became NaN or infinite, or were and no longer are"
        )
    if not distance.float_type:
        return f"{1 - distance.mismatch:.1%} of output {name!r} the same, {LEAST_AGREEMENT:.0%} needed"
    if distance.scale == 0 and distance.max_abs:
        return f"output {name!r} was zero throughout, and no longer is"
    top1 = f", same top-1 {distance.top1:.1%}" if distance.top1 is not None else ""
    return f"SQNR {distance.sqnr:.2f} dB of output {name!r}, {bound:g} dB needed{top1}"


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
