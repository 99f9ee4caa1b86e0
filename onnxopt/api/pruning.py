"""Prune a model: cut, clean up, say what it saves and what it loses; as much as a budget allows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.api.common import record, silent, sizes_of, versions
from onnxopt.api.optimization import optimize
from onnxopt.api.packing import packed_sizes
from onnxopt.api.preparation import samples_of
from onnxopt.benchmarking.profits import Guard
from onnxopt.benchmarking.settings import session_config
from onnxopt.calibration import split
from onnxopt.claims import Pass, kind_of, spelling
from onnxopt.data import Feeds, FeedSource
from onnxopt.errors import UsageError
from onnxopt.job import Job, Progress
from onnxopt.metric import Budget, Metric, parse_drop
from onnxopt.model import ModelLike, clone, fingerprint, opener, reusable
from onnxopt.pipeline import Outcome, Pipeline
from onnxopt.pruning.search import Candidate, Passes, Searched, strongest
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


def prune(
    model: ModelLike,
    passes: str | Sequence[str | ir.passes.PassBase],
    *,
    data: FeedSource | None = None,
    target: str = "cpu",
    metric: str | Callable[..., Any] | Metric | None = None,
    max_drop: str | float | None = None,
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
    the strongest pruning that keeps the budget is looked for, up to what is spelled.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        passes: as in a recipe, ``"prune-channels{macs=0.5},prune-weights{sparsity=0.8}"``, or as objects, in
            this order. Those that can use samples get them where `data` is given.
        data: samples as in use (see `onnxopt.data.read_feeds`); a part of them, told by their content, is
            held out to judge by. Without data samples are made up, and nothing is fitted to them.
        target: where it is to run: cpu, cuda, tensorrt or generic.
        metric: how good the model is (see `onnxopt.metric.load_metric`); by default `agreement`.
        max_drop: how much of the metric may be lost: 0.005, or "1%" of what it was.
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
    samples = samples_of(job, data)
    fitted, held_out = split(samples)
    say("running the original", None)
    judge = Judge(model, held_out, metric or "agreement", budget or _ANY)
    work = _Work(job, held_out, judge, _merged(job, asked, held_out))
    wanted = {"samples": None if data is None else fitted, "multiple": where.multiple, "masks": masks}
    fed = tuple(_filled(one, wanted) for one in asked)
    searched = strongest(fed, work.dense, work.candidate, work.noise, guarded=budget is not None)
    reason = _why_not(searched)
    say("cleaning up", None)
    best = searched.best if reason else work.finished(searched.best)
    settings = () if reason else job.settle(best.model, "lossy", samples, measure=bench)
    config = session_config(settings)
    timing = job.time(model, best.model, samples, config) if bench and not reason else None
    result = job.open_model() if reason else best.model
    sha256 = fingerprint(model, job.original)
    if metadata and not reason:
        record(result, [spelling(one) for one in best.passes], sha256)
    sizes = {**(shapes or {}), **sizes_of(samples)}
    report = PruningReport(
        source=os.fspath(model) if isinstance(model, str | os.PathLike) else f"({type(model).__name__})",
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
        packed=None if reason else packed_sizes(model, best.model),
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

    def candidate(self, passes: Passes) -> Candidate:
        """Run passes on a copy, and judge it."""
        outcome = self._run(passes)
        self.job.progress("judging the result", None)
        return Candidate(passes, outcome.model, outcome.steps, self.judge(outcome.model))

    def noise(self, passes: Passes) -> float:
        """Of the outputs, over the signal, on a few samples."""
        few = self.samples[:_FEW]
        with open_session(self.dense) as session:
            expected = [session.run(feeds) for feeds in few]
        with open_session(self._run(passes).model) as session:
            return noise_between(expected, [session.run(feeds) for feeds in few])

    def finished(self, best: Candidate) -> Candidate:
        """Cleaned up for the target, under proof, and judged again."""
        cleaned = optimize(
            best.model, target=self.job.target.name, data=self.samples, bench=False, metadata=False
        )
        return replace(best, model=cleaned.graph, judgement=self.judge(cleaned.graph, "final"))

    def _run(self, passes: Passes) -> Outcome:
        def say(name: str) -> None:
            self.job.progress(f"pruning: {name}", None)

        return Pipeline(passes, rounds=1).run(lambda: clone(self.dense), on_pass=say)


def _parsed(passes: str | Sequence[str | ir.passes.PassBase]) -> Passes:
    """Raises UsageError where none of them loses anything: such are for `optimize`."""
    given = parse_passes(passes) if isinstance(passes, str) else passes
    found = tuple(parse_pass(one) if isinstance(one, str) else one for one in given)
    if not any(kind_of(one) == "lossy" for one in found):
        raise UsageError("prune: say what to prune, as prune-channels{macs=0.5}; `onnxopt passes` lists all")
    return found


def _merged(job: Job, passes: Passes, samples: Sequence[Feeds]) -> ir.Model:
    """The original behind the recipe `default`; with its BatchNormalization where scores are of that."""
    of_norms = any(getattr(one, "score", "") == "bn-gamma" for one in passes)
    done = optimize(
        job.open_model(),
        target="generic",
        data=samples,
        skip=("fold-batchnorm",) if of_norms else (),
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


def _why_not(searched: Searched) -> str:
    """Why the result is the model as it was; empty where it is not."""
    best = searched.best
    if not best.changes:
        declined = [f"{step.name}: {why}" for step in best.steps for why in step.declined]
        return (
            f"nothing was pruned: {declined[0] if declined else 'there is nothing that the passes apply to'}"
        )
    return "" if best.judgement.ok else f"no strength keeps the budget: {best.judgement.summary}"
