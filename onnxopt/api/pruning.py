"""Prune a model: cut, clean up, say what it saves and what it loses; as much as a budget allows."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.api.common import record, silent, sizes_of, source_of, versions
from onnxopt.api.optimization import optimize
from onnxopt.api.packing import packed_sizes
from onnxopt.api.preparation import samples_of
from onnxopt.benchmarking.profits import Guard
from onnxopt.benchmarking.settings import session_config
from onnxopt.calibration import split
from onnxopt.claims import Pass, kind_of, pass_name, spelling
from onnxopt.data import Feeds, FeedSource
from onnxopt.errors import UsageError
from onnxopt.job import Job, Progress
from onnxopt.metric import Budget, Metric, NoRowsError, parse_drop
from onnxopt.model import ModelLike, clone, fingerprint, opener, reusable
from onnxopt.pipeline import Outcome, Pipeline
from onnxopt.pruning.search import Candidate, Passes, Searched, fast_enough, strongest, up_to
from onnxopt.pruning.weights import sparsity
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.sensitivity import noise_between
from onnxopt.recipe import parse_pass, parse_passes
from onnxopt.reporting import measure_size
from onnxopt.reporting.pruning import PruningReport
from onnxopt.result import Result
from onnxopt.runtimes import open_session
from onnxopt.targets import find_target

__all__ = ["prune"]

_ANY = Budget(float("inf"))
_FEW = 6
"""Samples that the noise of a part is measured on."""
_TRIAL_S = 3.0
"""Seconds to measure the time of a candidate."""


def prune(
    model: ModelLike,
    passes: str | Sequence[str | ir.passes.PassBase],
    *,
    data: FeedSource | None = None,
    target: str = "cpu",
    metric: str | Callable[..., Any] | Metric | None = None,
    max_drop: str | float | None = None,
    latency: float | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    freeze_initializers: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    bench: bool = True,
    metadata: bool = True,
    progress: Progress | None = None,
) -> Result[PruningReport]:
    """Run passes that make a model smaller at a loss, and say what that saves and what it costs.

    The recipe `default` runs before, under proof, so that scores are of merged layers, and the target's
    behind the passes. Without `max_drop` the passes are run as they are spelled, whatever is lost; with it
    the strongest pruning that keeps the budget is looked for, up to what is spelled. With `latency` the
    weakest one that is as fast as that is looked for, and the budget has to hold for it, too.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        passes: as in a recipe, ``"prune-channels{macs=0.5},prune-weights{sparsity=0.8}"``, or as objects, in
            this order. Those that can use samples get them where `data` is given.
        data: samples as in use (see `onnxopt.data.read_feeds`); a part of them, told by their content, is
            held out to judge by. Without data samples are made up, and nothing is fitted to them.
        target: where it is to run: cpu, cuda, tensorrt or generic.
        metric: how good the model is (see `onnxopt.metric.load_metric`); by default
            `agreement`, or `sqnr` where no output has rows of scores and there is no budget.
        max_drop: how much of the metric may be lost: 0.005, or "1%" of what it was.
        latency: share of the original's time that the result may take, as measured on this machine.
        masks: for `prune-weights`: name of a weight -> bool array, True where an element stays (see
            `onnxopt.pruning.masks.read_masks`); then nothing is scored.
        freeze_initializers: let initializers that are graph inputs become constants.
        shapes: sizes for dynamic graph inputs, by input name.
        seed: of synthetic samples and of the measurement.
        bench: measure latency on the target's provider.
        metadata: record in the model's metadata what was done to it.
        progress: called with each thing that is done.

    Raises:
        ModelError, UsageError: input that cannot be used, or a pass that cannot do what it is asked for.
        RuntimeMissingError: onnxruntime is not installed.
    """
    started = time.perf_counter()
    asked = _parsed(passes)
    where = find_target(target)
    budget = parse_drop(max_drop) if max_drop is not None else None
    _check_latency(latency, bench)
    model, say = reusable(model), progress or silent
    say("reading the model", None)
    open_model, guard = opener(model), Guard((), where.provider, measure=False)
    job = Job(
        model,
        open_model(),
        open_model,
        Pipeline(asked, rounds=1),
        where,
        guard,
        shapes,
        seed,
        say,
        frozen=freeze_initializers,
    )
    samples = samples_of(job, data, "prune")
    fitted, held_out = split(samples)
    say("running the original", None)
    judge = _judge(job, held_out, metric, budget)
    work = _Work(job, held_out, judge, _merged(job, asked, held_out), samples)
    sizes = {**(shapes or {}), **sizes_of(samples)}
    wanted = {
        "samples": None if data is None else fitted,
        "shapes": sizes,
        "multiple": where.multiple,
        "masks": masks,
    }
    fed = tuple(up_to(_filled(one, wanted), latency / 2 if latency else 0.5) for one in asked)
    searched = (
        fast_enough(fed, work.timed, latency)
        if latency is not None
        else strongest(fed, work.dense, work.candidate, work.noise, guarded=budget is not None)
    )
    reason = _why_not(searched, latency)
    say("cleaning up", None)
    best = searched.best if reason else work.finished(searched.best)
    reason = reason or _why_not(replace(searched, best=best), latency)
    settings = () if reason else job.settle(best.model, "lossy", samples, measure=bench)
    config = session_config(settings)
    if settings:
        best = replace(best, judgement=work.judge(best.model, "final", config))
        reason = _why_not(replace(searched, best=best), latency)
    timing = job.time(model, best.model, samples, config) if bench and not reason else None
    if latency is not None and timing is not None and timing.ratio > latency:
        reason = f"{latency:g} of the time was reached, but not again: {timing.ratio:.3f} in the end"
    result = job.open_model() if reason else best.model
    sha256 = fingerprint(model, job.original)
    if metadata and not reason:
        record(result, [spelling(one) for one in best.passes], sha256)
    packed = None if reason else packed_sizes(model, best.model)
    if packed is None and not reason:
        job.notes.append("not packed to see its size: that takes onnxopt[pack], and no more than 256 MB")
    report = PruningReport(
        source=source_of(model),
        input_sha256=sha256,
        target=where.name,
        seed=seed,
        versions=versions(),
        samples=(len(fitted), len(held_out)),
        synthetic=data is None,
        before=measure_size(job.original, sizes),
        after=measure_size(best.model, sizes),
        searched=replace(searched, best=best),
        layers=sparsity(best.model),
        packed=packed,
        settings=settings,
        timing=timing,
        reason=reason,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
    return Result(result, report, model)


@dataclass(frozen=True)
class _Work:
    """The prepared model, and what is done with it for each candidate."""

    job: Job
    samples: Sequence[Feeds]
    judge: Judge
    dense: ir.Model
    timed_on: Sequence[Feeds]

    def candidate(self, passes: Passes) -> Candidate:
        """Run passes on a copy, and judge it."""
        outcome = self._run(passes)
        self.job.progress("judging the result", None)
        return Candidate(passes, outcome.model, outcome.steps, self.judge(outcome.model))

    def noise(self, passes: Passes) -> float:
        """Of the outputs, over the signal, on a few samples."""
        with open_session(self._run(passes).model) as session:
            found = [session.run(feeds) for feeds in self.samples[:_FEW]]
        return noise_between(self._expected, found)

    @functools.cached_property
    def _expected(self) -> list[dict[str, Any]]:
        with open_session(self.dense) as session:
            return [session.run(feeds) for feeds in self.samples[:_FEW]]

    def timed(self, passes: Passes) -> Candidate:
        """Run passes on a copy, clean it up, judge it, and measure its time against the original's.

        Raises UsageError where the target's provider is not here.
        """
        made = self.candidate(passes)
        timing = self.job.time(self.job.model, self._cleaned(made.model), self.timed_on, {}, seconds=_TRIAL_S)
        if timing is None:
            raise UsageError(f"prune: latency cannot be measured here: {self.job.notes[-1]}")
        return replace(made, time=timing.interval[1])

    def finished(self, best: Candidate) -> Candidate:
        """Cleaned up for the target, under proof, and judged again."""
        cleaned = self._cleaned(best.model)
        return replace(best, model=cleaned, judgement=self.judge(cleaned, "final"))

    def _cleaned(self, model: ir.Model) -> ir.Model:
        target = self.job.target.name
        graph = optimize(model, target=target, data=self.samples, bench=False, metadata=False).graph
        tidy = Pipeline((parse_pass("eliminate-dead"),))  # also where nothing can be proved
        return tidy.run(lambda: graph).model

    def _run(self, passes: Passes) -> Outcome:
        def say(name: str) -> None:
            self.job.progress(f"pruning: {name}", None)

        return Pipeline(passes, rounds=1).run(lambda: clone(self.dense), on_pass=say)


def _judge(
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


def _parsed(passes: str | Sequence[str | ir.passes.PassBase]) -> Passes:
    """Raises UsageError where none of them loses anything: such are for `optimize`."""
    given = (passes,) if isinstance(passes, str) else passes
    parts = (parse_passes(one) if isinstance(one, str) else (one,) for one in given)
    found = tuple(itertools.chain.from_iterable(parts))
    if not any(kind_of(one) == "lossy" for one in found):
        raise UsageError("prune: say what to prune, as prune-channels{macs=0.5}; `onnxopt passes` lists all")
    return found


def _merged(job: Job, passes: Passes, samples: Sequence[Feeds]) -> ir.Model:
    """The original behind the recipe `default`; with what the passes look for still there."""
    skip = ["fold-batchnorm"] if any(getattr(one, "score", "") == "bn-gamma" for one in passes) else []
    if any(pass_name(one) == "drop-layers" for one in passes):
        skip += ["retarget-gemm", "merge-gemm"]  # which would hide the sum at the end of a block
    done = optimize(
        job.open_model(),
        target="generic",
        data=samples,
        skip=skip,
        freeze_initializers=job.frozen,
        bench=False,
        metadata=False,
        progress=job.progress,
    )
    return done.graph


def _filled(one: ir.passes.PassBase, wanted: Mapping[str, Any]) -> ir.passes.PassBase:
    """The pass with these, as far as it has such fields and leaves them open."""
    if not isinstance(one, Pass):
        return one
    left = {name: value for name, value in wanted.items() if getattr(one, name, "missing") is None}
    return replace(one, **left)


def _check_latency(latency: float | None, bench: bool) -> None:
    if latency is not None and not bench:
        raise UsageError("prune: latency is measured, and measuring is switched off (--no-bench)")
    if latency is not None and not 0 < latency < 1:
        raise UsageError(f"prune: latency is {latency:g}; expected a share of the time between 0 and 1")


def _why_not(searched: Searched, latency: float | None) -> str:
    """Why the result is the model as it was; empty where it is not."""
    best, first = searched.best, searched.trials[0]
    if not best.changes and not first.ok and latency is None:
        return f"no strength that changes anything keeps the budget: {first.summary}"
    if not best.changes:
        left = [(len(at), f"{step.name}: {why}") for step in best.steps for why, at in step.declined.items()]
        _, why = max(left, key=lambda one: one[0], default=(0, "there is nothing that the passes apply to"))
        return f"nothing was pruned: {why}"
    if latency is not None and best.time is not None and best.time > latency:
        return f"{latency:g} of the time is not reached: {best.time:.3f} at best"
    return "" if best.judgement.ok else f"no strength keeps the budget: {best.judgement.summary}"
