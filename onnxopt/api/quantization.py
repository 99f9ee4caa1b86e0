"""Quantize a model: prepare, quantize, prove what runs, judge accuracy and speed; keep it only if it pays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from onnxopt.api.checks import lint_findings, new_error, not_here, saturation_notes
from onnxopt.api.common import record, silent, sizes_of, versions
from onnxopt.api.finishing import (
    TRIAL_S,
    best_of,
    best_without_data,
    comparison,
    left_in_float,
    nearest_of,
)
from onnxopt.api.preparation import (
    prepare,
    prepared,
    require_opset,
    require_use,
    samples_of,
    settings_for,
)
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.profits import Guard
from onnxopt.benchmarking.settings import Setting, session_config
from onnxopt.calibration import split
from onnxopt.data import Feeds, FeedSource
from onnxopt.emulation import find_isa
from onnxopt.graph import tensor_bytes
from onnxopt.inspection.lints import Finding
from onnxopt.job import Job, Progress
from onnxopt.metric import Budget, Metric, parse_drop
from onnxopt.model import ModelLike, fingerprint, opener, reusable
from onnxopt.pipeline import Outcome
from onnxopt.quantization.branches import name_values_apart
from onnxopt.quantization.finish import Finished
from onnxopt.quantization.fusion import kernels_of
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.keep import kept_sites
from onnxopt.quantization.planfile import PlanSource, read_plan
from onnxopt.quantization.schemes import Scheme, find_scheme
from onnxopt.quantization.static import Goal, Static
from onnxopt.quantization.units import Survey
from onnxopt.quantization.whole import quantize_whole
from onnxopt.reporting import measure_size
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.result import Result
from onnxopt.targets import find_target

__all__ = ["quantize"]

_SMALLER = 0.99
"""Less than this share of the bytes is smaller."""
_TIMED_S = (3.0, 10.0)
"""Seconds of measurement: the second where the first cannot tell the two apart."""
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
    model = reusable(model)
    say = progress or silent
    say("reading the model", None)
    pipeline = prepare(chosen, settings, where, freeze_initializers)
    guard = Guard((), where.provider, measure=False)
    open_model = opener(model)
    job = Job(
        model, open_model(), open_model, pipeline, where, guard, shapes, seed, say, frozen=freeze_initializers
    )
    sha256 = fingerprint(model, job.original)
    if given is not None:
        given.require(sha256)
    samples = samples_of(job, data)
    fitted, held_out = split(samples)
    config = settings.session_config if settings is not None else {}
    say("running the original", None)
    if metric is None and budget is not None:
        metric = "agreement"
    judge = Judge(model, held_out, metric, budget, also_isa, config)
    outcome = prepared(job, held_out)
    name_values_apart(outcome.model)
    kept = kept_sites(outcome.model, keep)
    found: Static | Survey | None = None
    pays = comparison(job, goal, samples, measure=bench)
    if settings is not None:
        require_opset(outcome, settings)
        settings = replace(settings, keep=kept)
        found = quantize_whole(outcome.model, fitted, held_out, settings, judge, say, given)
        made = best_of(found, outcome.model, chosen, where, settings, judge, pays)
        quantized, judgement = (made.model, made.judgement) if made.judgement else nearest_of(found, where)
        left = left_in_float(found, made.rewritten)
    else:
        options = {"per_channel": per_channel, "power_of_two": power_of_two, "reduce_range": bool(also_isa)}
        options |= {"contrib": where.contrib, "even": where.placement == "tensorrt"}
        made, left = best_without_data(outcome.model, chosen, options, kept, judge)
        quantized, judgement = (made.model, made.judgement) if made.judgement else (None, None)
    timing: Timing | None = None
    proposed: tuple[Setting, ...] = ()
    findings: tuple[Finding, ...] = ()
    elsewhere = not_here(where)
    job.notes.extend(note for note in (chosen.note, elsewhere) if note)
    reason = _why_not(found, made, judgement, chosen, left)
    if not reason and quantized is not None:
        findings = lint_findings(quantized, where)
        reason = new_error(findings, model, where)
    if not reason and quantized is not None:
        proposed = job.settle(quantized, "lossy", samples, measure=bench and not elsewhere)
        more = session_config(proposed)
        say("judging the result", None)
        judgement = judge(quantized, "final", more)
        reason = "" if judgement.ok else f"the result does not keep the budget: {judgement.reason}"
    if not reason and quantized is not None:
        timing = _timed(job, quantized, samples, more) if bench and not elsewhere else None
        reason = _why_not_worth_it(goal, timing, job.original, quantized)
        reason = reason or _why_plain_does(job, timing, goal, outcome, quantized, samples, more)
    if judgement is not None and not judgement.unseen:
        job.notes.append(_SEEN)
    result = job.open_model() if reason or quantized is None else quantized
    if metadata and not reason:
        record(result, [*(s.name for s in outcome.steps if s.changes), chosen.name], sha256)
    sizes = {**(shapes or {}), **sizes_of(samples)}
    after = measure_size(quantized if quantized is not None else job.original, sizes)
    kernels: Mapping[str, int] = {}
    if quantized is not None and judgement is not None and where.provider == "cpu" and not elsewhere:
        kernels = kernels_of(quantized)
        if not also_isa and (settings is None or settings.timed):
            job.notes += saturation_notes(quantized, judge, after.macs, len(held_out), measure=bench)
    report = QuantizationReport(
        source=os.fspath(model) if isinstance(model, str | os.PathLike) else f"({type(model).__name__})",
        input_sha256=sha256,
        target=where.name,
        scheme=chosen.name,
        goal=goal,
        seed=seed,
        versions=versions(),
        samples=(len(fitted), len(held_out)),
        synthetic=data is None,
        before=measure_size(job.original, sizes),
        after=after,
        steps=outcome.steps,
        static=found if isinstance(found, Static) else None,
        finished=made,
        left=left,
        kernels=dict(kernels),
        findings=findings,
        judgement=judgement,
        settings=proposed,
        timing=timing,
        reason=reason,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
    return Result(result, report, model)


def _timed(
    job: Job, quantized: ir.Model, samples: Sequence[Feeds], config: Mapping[str, str]
) -> Timing | None:
    for seconds in _TIMED_S:
        timing = job.time(job.model, quantized, samples, config, seconds=seconds)
        if timing is None or timing.verdict != "no measurable difference":
            break
    return timing


def _why_not(
    found: Static | Survey | None,
    made: Finished,
    judgement: Judgement | None,
    scheme: Scheme,
    left: Mapping[str, Sequence[str]],
) -> str:
    """Why there is no result, before speed is looked at; empty where there is one."""
    if judgement is not None:
        return "" if judgement.ok else f"no candidate keeps the budget; the nearest: {judgement.reason}"
    why = [f"{len(sites)} {reason}" for reason, sites in left.items()]
    why += [f"{one.name} is left out: {one.why}" for one in made.tried if one.sites]
    if isinstance(found, Static) and found.searched.unfused:
        why.append(f"{len(found.searched.unfused)} nodes that the runtime does not fuse")
    if not why:
        otherwise = "integers would not make it faster" if isinstance(found, Static) else ""
        why = [otherwise or f"there is nothing that {scheme.name} applies to"]
    return f"nothing was quantized: {'; '.join(why)}"


def _why_not_worth_it(goal: Goal, timing: Timing | None, before: ir.Model, after: ir.Model) -> str:
    if goal == "size":
        was, now = tensor_bytes(before), tensor_bytes(after)
        smaller = now < _SMALLER * was
        return "" if smaller else f"the result is not smaller: {now:,} bytes of tensors, it had {was:,}"
    if timing is None or timing.verdict == "faster":
        return ""
    return f"it is not faster: {timing.summary}"


def _why_plain_does(
    job: Job,
    timing: Timing | None,
    goal: Goal,
    prepared: Outcome,
    quantized: ir.Model,
    samples: Sequence[Feeds],
    config: Mapping[str, str],
) -> str:
    """What says that the gain in speed is that of the preparation alone; empty where nothing does."""
    if goal == "size" or timing is None or not prepared.changes:
        return ""
    gain = job.time(prepared.model, quantized, samples, config, seconds=TRIAL_S)
    if gain is None or gain.verdict == "faster":
        return ""
    return f"it is not faster than the float model is once it is optimized: {gain.summary}"
