"""What `prune` tries: copies of the prepared model, pruned, judged and timed; and what comes of the best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from onnxopt.api.optimization import optimize
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.settings import Setting, session_config
from onnxopt.claims import kind_of, pass_name, spelling
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.job import Job
from onnxopt.metric import Budget, Metric, NoRowsError
from onnxopt.model import clone
from onnxopt.pipeline import Outcome, Pipeline
from onnxopt.pruning.outcome import channel_cut
from onnxopt.pruning.search import Candidate, Passes, Searched, fast_enough, strongest
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.sensitivity import noise_between
from onnxopt.recipe import load_recipe, parse_pass
from onnxopt.runtimes import open_session

__all__ = ["Ended", "Trials", "judge_of", "prepared_for"]

_ANY = Budget(float("inf"))
_FEW = 6
"""Samples that the noise of a part is measured on."""
_TRIAL_S = 3.0
"""Seconds to measure the time of a candidate."""
_GROWTH = 64
"""Bytes that a constant may grow by: shapes are folded, weights stay as small as they are stored."""


@dataclass(frozen=True)
class Ended:
    """The search with its best candidate, cleaned up and judged again. reason: why it is not the result."""

    searched: Searched
    reason: str = ""
    settings: tuple[Setting, ...] = ()
    timing: Timing | None = None


@dataclass(frozen=True)
class Trials:
    """The prepared model, and what is done with it for each candidate.

    samples: all of them, fitted to or held out. guarded: whether there is a budget for the metric. latency:
    share of the original's time that is allowed; None: any.
    """

    job: Job
    samples: Sequence[Feeds]
    fitted: Sequence[Feeds]
    held_out: Sequence[Feeds]
    judge: Judge
    dense: ir.Model
    guarded: bool
    latency: float | None

    def search(self, passes: Passes) -> Searched:
        """The candidate that the budgets want: the strongest, or the weakest that is fast enough."""
        if self.latency is not None:
            found = fast_enough(passes, self.timed, self.latency)
        else:
            found = strongest(passes, self.dense, self.candidate, self.noise, guarded=self.guarded)
        fixed = [spelling(one) for one in found.fixed if kind_of(one) == "lossy"]
        self.job.notes += [f"{one} has no strength to look for: it ran as it is" for one in fixed]
        return found

    def ended(self, searched: Searched, *, bench: bool) -> Ended:
        """What comes of the best candidate: cleaned up, with its settings, judged again, and timed."""
        reason = _why_not(searched, self.latency)
        if reason:
            return Ended(searched, reason)
        self.job.progress("cleaning up", None)
        cleaned = self._cleaned(searched.best.model)
        best = replace(searched.best, model=cleaned, judgement=self.judge(cleaned, "final"))
        searched = replace(searched, best=best)
        reason = _why_not(searched, self.latency)
        if reason:
            return Ended(searched, reason)
        settings = self.job.settle(cleaned, "lossy", self.samples, measure=bench)
        config = session_config(settings)
        if settings:
            best = replace(best, judgement=self.judge(cleaned, "final", config))
            searched = replace(searched, best=best)
            reason = _why_not(searched, self.latency)
        if reason or not bench:
            return Ended(searched, reason, settings)
        timing = self.job.time(self.job.model, cleaned, self.samples, config)
        if self.latency is not None and timing is not None and timing.ratio > self.latency:
            reason = f"{self.latency:g} of the time was reached, but not again: {timing.ratio:.3f} in the end"
        return Ended(searched, reason, settings, timing)

    def candidate(self, passes: Passes) -> Candidate:
        """Run passes on a copy, and judge it."""
        outcome = self._run(passes)
        self.job.progress("judging the result", None)
        judgement = self.judge(outcome.model)
        return Candidate(passes, outcome.model, outcome.steps, judgement, cut=channel_cut(outcome.model))

    def noise(self, passes: Passes) -> float:
        """Of the outputs, over the signal, on a few samples."""
        with open_session(self._run(passes).model) as session:
            found = [session.run(feeds) for feeds in self.held_out[:_FEW]]
        return noise_between(self._expected, found)

    def timed(self, passes: Passes) -> Candidate:
        """Run passes on a copy, clean it up, judge it, and measure its time against the original's.

        Raises UsageError where the target's provider is not here.
        """
        made = self.candidate(passes)
        timing = self.job.time(self.job.model, self._cleaned(made.model), self.samples, {}, seconds=_TRIAL_S)
        if timing is None:
            raise UsageError(f"prune: latency cannot be measured here: {self.job.notes[-1]}")
        return replace(made, time=timing.interval[1])

    @functools.cached_property
    def _expected(self) -> list[dict[str, Any]]:
        with open_session(self.dense) as session:
            return [session.run(feeds) for feeds in self.held_out[:_FEW]]

    def _cleaned(self, model: ir.Model) -> ir.Model:
        where = self.job.target
        cleaned = optimize(
            model,
            target=where.name,
            recipe=_thrifty(where.recipe),
            data=self.held_out,
            bench=False,
            metadata=False,
        ).graph
        tidy = Pipeline((parse_pass("eliminate-dead"),))  # also where nothing can be proved
        return tidy.run(lambda: cleaned).model

    def _run(self, passes: Passes) -> Outcome:
        def say(name: str) -> None:
            self.job.progress(f"pruning: {name}", None)

        return Pipeline(passes, rounds=1).run(lambda: clone(self.dense), on_pass=say)


def judge_of(
    job: Job,
    samples: Sequence[Feeds],
    metric: str | Callable[..., Any] | Metric | None,
    budget: Budget | None,
) -> Judge:
    """By agreement where nothing else is asked for; without a budget by sqnr, where no output has rows."""
    try:
        return Judge(job.model, samples, metric or "agreement", budget or _ANY)
    except NoRowsError:
        if metric is not None or budget is not None:
            raise
    return Judge(job.model, samples, "sqnr", _ANY)


def prepared_for(job: Job, samples: Sequence[Feeds]) -> ir.Model:
    """The original of a job behind the recipe `default`; with what its passes look for still there."""
    passes = job.pipeline.passes
    skip = ["fold-batchnorm"] if any(getattr(one, "score", "") == "bn-gamma" for one in passes) else []
    if any(pass_name(one) == "drop-layers" for one in passes):
        skip += ["retarget-gemm", "merge-gemm"]  # which would hide the sum at the end of a block
    done = optimize(
        job.open_model(),
        target="generic",
        recipe=_thrifty("default"),
        data=samples,
        skip=skip,
        freeze_initializers=job.frozen,
        bench=False,
        metadata=False,
        progress=job.progress,
    )
    return done.graph


def _thrifty(recipe: str) -> Pipeline:
    """A recipe that keeps weights as small as they are stored, and makes no second copy of any."""
    pipeline = load_recipe(recipe)
    passes = (
        replace(one, max_growth=_GROWTH) if hasattr(one, "max_growth") else one  # type: ignore[type-var]
        for one in pipeline.passes
    )
    return replace(pipeline, passes=tuple(passes))


def _why_not(searched: Searched, latency: float | None) -> str:
    """Why the result is the model as it was; empty where it is not."""
    best, first = searched.best, searched.trials[0]
    if not best.changes and not first.ok and latency is None:
        return f"no strength that changes anything keeps the budget: {first.summary}"
    if not best.changes:
        left = [(len(at), f"{step.name}: {why}") for step in best.steps for why, at in step.declined.items()]
        _, why = max(
            left,
            key=lambda one: one[0],
            default=(0, "there is nothing, or nothing more, that the passes apply to"),
        )
        return f"nothing was pruned: {why}"
    if latency is not None and best.time is not None and best.time > latency:
        return f"{latency:g} of the time is not reached: {best.time:.3f} at best"
    return "" if best.judgement.ok else f"no strength keeps the budget: {best.judgement.summary}"
