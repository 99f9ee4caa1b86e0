"""Quantize a model: prepare, quantize, prove what runs, judge accuracy and speed; keep it only if it pays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from onnxopt.api.candidates import find_candidate
from onnxopt.api.checks import not_here, saturation_notes
from onnxopt.api.common import opened, record, silent, sizes_of, source_of, versions
from onnxopt.api.preparation import prepare, prepared, require_use, samples_of, settings_for
from onnxopt.api.proving import prove
from onnxopt.api.work import Candidate, Proved, Work
from onnxopt.calibration import split
from onnxopt.data import FeedSource
from onnxopt.emulation import find_isa
from onnxopt.job import Progress
from onnxopt.metric import Budget, Metric, parse_drop
from onnxopt.model import ModelLike, fingerprint
from onnxopt.quantization.branches import name_values_apart
from onnxopt.quantization.fusion import kernels_of
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.keep import kept_sites
from onnxopt.quantization.planfile import PlanSource, read_plan
from onnxopt.quantization.schemes import find_scheme
from onnxopt.quantization.static import Goal, Static
from onnxopt.reporting import measure_size
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.result import Result
from onnxopt.targets import find_target

__all__ = ["quantize"]

_SEEN = (
    "the last check was on the samples that the search chose by, not on unseen ones; a metric with a "
    'parameter split can keep some for split="final"'
)


def quantize(
    model: ModelLike,
    *,
    data: FeedSource | None = None,
    scheme: str = "int8",
    target: str = "cpu",
    goal: Goal = "speed",
    metric: str | Callable[..., Any] | Metric | None = None,
    max_drop: str | float | None = None,
    calibration: str = "auto",
    activation: str | None = None,
    per_channel: bool = True,
    symmetric: bool = False,
    power_of_two: bool = False,
    keep: Sequence[str] = (),
    plan: PlanSource | None = None,
    sensitivity: bool = False,
    also_isa: Sequence[str] = (),
    freeze_initializers: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    bench: bool = True,
    metadata: bool = True,
    cache: str | os.PathLike[str] | None = None,
    workers: int = 1,
    executor: Literal["process", "ray"] = "process",
    progress: Progress | None = None,
) -> Result[QuantizationReport]:
    """Quantize a model so that it keeps its accuracy and is faster, or smaller, as asked.

    Nodes that cost too much accuracy stay in floating point; where no candidate keeps the budget and pays,
    the result is the model as it was, and `report.ok` is false with the best candidate's figures.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        data: samples as in use (see `onnxopt.data.read_feeds`); a part of them, told by their content, is
            held out to judge by. Without data samples are made up, and the report says what that costs.
        scheme: of `onnxopt.quantization.schemes.SCHEMES`.
        target: where it is to run: cpu, arm, cuda, tensorrt or generic.
        goal: "speed": measurably faster, where it can be measured here; "size": smaller.
        metric: how good the model is (see `onnxopt.metric.load_metric`). Without one, each float output has
            to keep the SQNR of `bounds.required_db`, and of others the share `judge.LEAST_AGREEMENT`.
        max_drop: how much of the metric may be lost: 0.005, or "1%" of what it was; by default 0.005.
        calibration: of `onnxopt.calibration.METHODS`.
        activation: format of activations; by default the scheme's, or the target's.
        per_channel: a scale for each output channel of a weight, not one for all.
        symmetric: the zero point of activations is in the middle of their integers, as TensorRT has it
            always; of unsigned integers it is 0 where nothing is negative.
        power_of_two: scales are powers of two.
        keep: patterns of outputs, nodes or operators that stay in floating point.
        plan: a file that `report.plan` was written to, or that itself: its ranges and its choice of nodes are
            taken, and neither calibrated nor searched for.
        sensitivity: report what each node costs in accuracy even where none has to stay in floating point.
        also_isa: instruction sets, as avx2, on whose emulated CPUs the budget has to be kept, too.
        freeze_initializers: let initializers that are graph inputs become constants.
        shapes: sizes for dynamic graph inputs, by input name.
        seed: of synthetic samples and of the measurement.
        bench: measure latency; without it "speed" trusts the table of kernel costs.
        metadata: record in the model's metadata what was done to it.
        cache: folder that keeps calibration, by the content of model, data and settings.
        workers, executor: processes, or tasks of a Ray cluster, that calibrate shards of the data.
        progress: called with each thing that is done.

    Raises:
        ModelError, UsageError: input that cannot be used, or an option that the scheme has no use for.
        ProviderError: an instruction set that cannot be emulated here.
        RuntimeMissingError: onnxruntime is not installed.
    """
    started = time.perf_counter()
    chosen, where = find_scheme(scheme), find_target(target)
    chosen.require(where)
    for isa in also_isa:
        find_isa(isa)
    budget = parse_drop(max_drop) if max_drop is not None else Budget(0.005) if metric is not None else None
    given = read_plan(plan) if plan is not None else None
    asked: dict[str, Any] = {
        "activation": activation,
        "symmetric": symmetric,
        "method": calibration,
        "per_channel": per_channel,
        "power_of_two": power_of_two,
        "sensitivity": sensitivity,
        "cache": Path(cache) if cache is not None else None,
        "workers": workers,
        "executor": executor,
    }
    require_use(chosen, {**asked, "plan": plan})
    settings = settings_for(chosen, where, goal=goal, saturates=bool(also_isa), **asked)
    pipeline = prepare(chosen, settings, where, freeze_initializers)
    job = opened(model, pipeline, where, shapes, seed, progress or silent, frozen=freeze_initializers)
    sha256 = fingerprint(job.model, job.original)
    if given is not None:
        given.require(sha256)
    samples = samples_of(job, data, "quantize")
    fitted, held_out = split(samples)
    job.progress("running the original", None)
    config = settings.session_config if settings is not None else {}
    metric = "agreement" if metric is None and budget is not None else metric
    judge = Judge(job.model, held_out, metric, budget, also_isa, config)
    outcome = prepared(job, held_out)
    name_values_apart(outcome.model)  # names tell nodes apart in reports and plans
    work = Work(
        job=job,
        scheme=chosen,
        settings=settings,
        options={
            "per_channel": per_channel,
            "power_of_two": power_of_two,
            "reduce_range": bool(also_isa),
            "contrib": where.contrib,
            "even": where.placement == "tensorrt",
        },
        goal=goal,
        measure=bench and not not_here(where),
        samples=samples,
        fitted=fitted,
        held_out=held_out,
        judge=judge,
        prepared=outcome,
        kept=kept_sites(outcome.model, keep),
        isas=tuple(also_isa),
    )
    candidate = find_candidate(work, given)
    proved = prove(work, candidate)
    result = job.open_model() if proved.reason or candidate.model is None else candidate.model
    if metadata and not proved.reason:
        record(result, [*(step.name for step in outcome.steps if step.changes), chosen.name], sha256)
    report = _report(work, candidate, proved, sha256, synthetic=data is None, started=started)
    return Result(result, report, job.model)


def _report(
    work: Work, candidate: Candidate, proved: Proved, sha256: str, *, synthetic: bool, started: float
) -> QuantizationReport:
    """The report; `started` is when the work began, of `time.perf_counter`."""
    job, found = work.job, candidate.found
    sizes = {**(job.shapes or {}), **sizes_of(work.samples)}
    after = measure_size(candidate.model if candidate.model is not None else job.original, sizes)
    kernels, notes = _as_run(work, candidate, proved, after.macs)
    return QuantizationReport(
        source=source_of(job.model),
        input_sha256=sha256,
        target=work.target.name,
        scheme=work.scheme.name,
        goal=work.goal,
        seed=job.seed,
        versions=versions(),
        samples=(len(work.fitted), len(work.held_out)),
        synthetic=synthetic,
        before=measure_size(job.original, sizes),
        after=after,
        steps=work.prepared.steps,
        static=found if isinstance(found, Static) else None,
        finished=candidate.made,
        left=candidate.left,
        kernels=kernels,
        findings=proved.findings,
        judgement=proved.judgement,
        settings=proved.settings,
        timing=proved.timing,
        reason=proved.reason,
        notes=(*job.notes, *notes),
        seconds=time.perf_counter() - started,
    )


def _as_run(
    work: Work, candidate: Candidate, proved: Proved, macs: int | str
) -> tuple[dict[str, int], list[str]]:
    """What the runtime here executes of a candidate, by operator, and what there is to note."""
    target, elsewhere = work.target, not_here(work.target)
    notes = [note for note in (work.scheme.note, elsewhere) if note]
    if proved.judgement is not None and not proved.judgement.unseen:
        notes.append(_SEEN)
    if candidate.model is None or target.provider != "cpu" or elsewhere:
        return {}, notes
    if not work.isas and (work.settings is None or work.settings.timed):
        notes += saturation_notes(candidate.model, work.judge, macs, len(work.held_out), measure=work.measure)
    return dict(kernels_of(candidate.model)), notes
