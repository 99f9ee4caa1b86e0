"""Quantize a model: prepare, quantize, prove what runs, judge accuracy and speed, and give it back only if it pays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from onnxopt.api.common import record, samples_for, silent, sizes_of, versions
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.profits import Guard
from onnxopt.calibration import METHODS, split
from onnxopt.data import Feeds, FeedSource
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import tensor_bytes
from onnxopt.job import Job, Progress
from onnxopt.metric import Budget, Metric, load_metric, parse_drop
from onnxopt.model import ModelLike, fingerprint, opener, reusable
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.fusion import kernels_of
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.schemes import Scheme, find_scheme
from onnxopt.quantization.static import Goal, Settings, Static, quantize_static
from onnxopt.quantization.units import Survey
from onnxopt.recipe import build_pipeline, parse_pass
from onnxopt.reporting import measure_size
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.result import Result
from onnxopt.runtimes import open_session
from onnxopt.targets import PLACEMENTS, Target, find_target

__all__ = ["quantize"]

_SAMPLES = 32
"""Samples that are made up where the user has none."""


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
    power_of_two: bool = False,
    keep: Sequence[str] = (),
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
) -> Result:
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
            to keep an SQNR of `judge.LEAST_DB`, and of others the share `judge.LEAST_AGREEMENT`.
        max_drop: how much of the metric may be lost: 0.005, or "1%" of what it was; by default 0.005.
        calibration: of `onnxopt.calibration.METHODS`.
        activation: format of activations; by default the target's.
        per_channel: a scale for each output channel of a weight, not one for all.
        power_of_two: scales are powers of two.
        keep: patterns of outputs, nodes or operators that stay in floating point.
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
        ModelError, UsageError: input that cannot be used.
        ProviderError: an instruction set that cannot be emulated here.
        RuntimeMissingError: onnxruntime is not installed.
    """
    started = time.perf_counter()
    chosen, where = find_scheme(scheme), find_target(target)
    if calibration not in METHODS:
        raise UsageError(f"unknown calibration method {calibration!r}{did_you_mean(calibration, METHODS)}")
    if chosen.static and not where.placement:
        raise UsageError(
            f"scheme {scheme} is not offered for target {target}: its provider has no integer kernels for it; "
            "take float16, or weight-only int8 or int4"
        )
    budget = parse_drop(max_drop) if max_drop is not None else Budget(0.005) if metric is not None else None
    model = reusable(model)
    say = progress or silent
    say("reading the model", None)
    pipeline = _preparation(chosen, where, freeze_initializers)
    guard = Guard((), where.provider, measure=False)
    open_model = opener(model)
    job = Job(
        model, open_model(), open_model, pipeline, where, guard, shapes, seed, say, frozen=freeze_initializers
    )
    samples = _samples(job, data)
    fitted, held_out = split(samples)
    outcome = job.run_under_proof(held_out, None)
    judge = _judge(model, metric, budget, fitted, held_out, also_isa)
    if chosen.static:
        settings = Settings(
            replace(PLACEMENTS[where.placement], name=where.placement),
            activation=chosen.activation or activation,
            weight=chosen.weight,
            method=calibration,
            per_channel=per_channel,
            power_of_two=power_of_two,
            keep=tuple(keep),
            goal=goal,
            saturates=bool(also_isa),
            timed=where.name in ("cpu", "generic"),
            cache=Path(cache) if cache is not None else None,
            workers=workers,
            executor=executor,
        )
        found = quantize_static(outcome.model, fitted, held_out, settings, judge, say)
        quantized, judgement = _best(found)
    else:
        found = None
        quantized = _rewritten(outcome.model, chosen, per_channel, power_of_two)
        judgement = judge(quantized) if quantized is not None else None
    timing: Timing | None = None
    reason = _why_not(found, quantized, judgement, chosen)
    if not reason and quantized is not None:
        quantized = _cleaned(quantized, where.placement)
        timing = job.time(job.model, quantized, samples, {}) if bench and where.provider == "cpu" else None
        reason = _why_not_worth_it(goal, timing, job.original, quantized)
    result = job.open_model() if reason or quantized is None else quantized
    if metadata and not reason:
        record(
            result,
            [*(s.name for s in outcome.steps if s.changes), str(chosen.name)],
            fingerprint(model, job.original),
        )
    sizes = {**(shapes or {}), **sizes_of(samples)}
    report = QuantizationReport(
        source=os.fspath(model) if isinstance(model, str | os.PathLike) else f"({type(model).__name__})",
        target=where.name,
        scheme=chosen.name,
        goal=goal,
        seed=seed,
        versions=versions(),
        samples=(len(fitted), len(held_out)),
        synthetic=data is None,
        before=measure_size(job.original, sizes),
        after=measure_size(quantized if quantized is not None else job.original, sizes),
        steps=outcome.steps,
        static=found if isinstance(found, Static) else None,
        left=found.left if isinstance(found, Survey) else found.surveyed.left if found is not None else {},
        kernels=dict(kernels_of(quantized)) if quantized is not None and where.provider == "cpu" else {},
        judgement=judgement,
        timing=timing,
        reason=reason,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
    return Result(result, report, model)


def _preparation(scheme: Scheme, target: Target, freeze: bool) -> Pipeline:
    """What makes the graph ready: folded, merged, and of an opset that has the scheme's operators.

    The runtime fuses no activation behind an integer kernel: each part would read it for itself.
    """
    pipeline = build_pipeline("quantize", freeze_initializers=freeze)
    more = ["fuse-activation{contrib=true}"] if target.contrib else []
    more.append(f"retarget-opset{{version={scheme.opset}}}")
    return replace(pipeline, passes=(*pipeline.passes, *map(parse_pass, more)))


def _samples(job: Job, data: FeedSource | None) -> Sequence[Feeds]:
    samples = samples_for(job, data)
    if not len(samples):
        raise UsageError("quantize: no samples could be made up for this model: give some with --data")
    if data is None:
        job.notes.append(
            "no --data: ranges and accuracy come from made-up samples, and say little of real ones; "
            "a few dozen real samples are worth more than any setting"
        )
    elif len(samples) < 8:
        job.notes.append(f"only {len(samples)} samples: ranges may be too narrow; 32 to 256 are usual")
    return samples


def _judge(
    model: ModelLike,
    metric: str | Callable[..., Any] | Metric | None,
    budget: Budget | None,
    fitted: Sequence[Feeds],
    held_out: Sequence[Feeds],
    isas: Sequence[str],
) -> Judge:
    if metric is None and budget is not None:
        metric = "agreement"
    if metric is None:
        return Judge(model, held_out, None, None, isas)
    with open_session(model) as session:
        loaded = load_metric(metric, session.run, held_out, held_out)
        return Judge(model, held_out, loaded, budget, isas)


def _best(found: Static | Survey) -> tuple[ir.Model | None, Judgement | None]:
    """The best candidate, or where none keeps the budget, the nearest."""
    if isinstance(found, Survey):
        return None, None
    candidate = found.searched.best or found.searched.nearest
    return (candidate.model, candidate.judgement) if candidate is not None else (None, None)


def _rewritten(model: ir.Model, scheme: Scheme, per_channel: bool, power_of_two: bool) -> ir.Model | None:
    """The model after the scheme's passes; None where they changed nothing."""
    pipeline = Pipeline(tuple(map(parse_pass, scheme.passes)), rounds=1)
    outcome = pipeline.run(lambda: model)
    return outcome.model if outcome.changes else None


def _cleaned(model: ir.Model, placement: str) -> ir.Model:
    """Without the float weights that nobody reads any more."""
    passes = ["eliminate-dead", "dedupe-initializers"]
    if placement in ("x86", "arm"):
        passes.insert(0, "merge-qdq")
    return Pipeline(tuple(map(parse_pass, passes))).run(lambda: model).model


def _why_not(
    found: Static | Survey | None, quantized: ir.Model | None, judgement: Judgement | None, scheme: Scheme
) -> str:
    """Why there is no result, before speed is looked at; empty where there is one."""
    if quantized is None or judgement is None:
        left = found.left if isinstance(found, Survey) else found.surveyed.left if found is not None else {}
        why = "; ".join(f"{len(sites)} {reason}" for reason, sites in left.items())
        if isinstance(found, Static):
            return (
                "nothing was quantized: integers would not make it faster"
                if not why
                else f"nothing was quantized: {why}"
            )
        return f"nothing was quantized: {why or f'there is nothing that {scheme.name} applies to'}"
    return "" if judgement.ok else f"no candidate keeps the budget; the nearest: {judgement.summary}"


def _why_not_worth_it(goal: Goal, timing: Timing | None, before: ir.Model, after: ir.Model) -> str:
    if goal == "size":
        smaller = tensor_bytes(after) < tensor_bytes(before)
        return "" if smaller else "the result is not smaller"
    if timing is None or timing.verdict == "faster":
        return ""
    return f"it is not faster: {timing.summary}"
