"""Rewrite a model under proof, and measure what it gains."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxopt.api.common import record, samples_for, silent, sizes_of, source_of, versions
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.profits import Guard
from onnxopt.benchmarking.settings import Setting, session_config
from onnxopt.claims import spelling
from onnxopt.data import Feeds, FeedSource
from onnxopt.job import Job, Progress
from onnxopt.model import ModelLike, fingerprint, opener, reusable
from onnxopt.pipeline import Outcome, Pipeline
from onnxopt.recipe import build_pipeline
from onnxopt.reporting import Report, measure_size
from onnxopt.result import Result
from onnxopt.targets import find_target

__all__ = ["optimize"]

_NOTICEABLE = 1.03
"""How much slower a result without its settings may be before that is said."""


def optimize(
    model: ModelLike,
    *,
    target: str = "cpu",
    recipe: str | os.PathLike[str] | Pipeline | None = None,
    passes: str | Sequence[str | ir.passes.PassBase] = (),
    skip: Sequence[str] = (),
    freeze_initializers: bool = False,
    stop_after: int | None = None,
    data: FeedSource | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    verify: bool = True,
    bench: bool = True,
    metadata: bool = True,
    progress: Progress | None = None,
) -> Result[Report]:
    """Rewrite a model, prove that its numbers hold, and measure whether it is faster.

    What breaks the numbers is left out and reported. Where nothing can be proved, or the result is
    measurably slower, the model is left as it was.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        target: where it is to run: cpu, cuda, tensorrt or generic (standard operators only).
        recipe: a shipped recipe's name, a TOML file or a `Pipeline`; by default the target's.
        passes: passes to run instead of the recipe's, as in a recipe or as objects.
        skip: names of passes of the recipe to leave out.
        freeze_initializers: let initializers that are graph inputs become constants.
        stop_after: make this many rewrites, then stop.
        data: samples to prove on (see `onnxopt.data.read_feeds`); by default synthetic ones.
        shapes: sizes for dynamic graph inputs, by input name.
        seed: of synthetic samples and of the measurement.
        verify: prove the numbers; without it only structure is checked.
        bench: measure latency on the target's provider.
        metadata: record passes, versions and the input's fingerprint in the model's metadata.
        progress: called with each thing that is done.

    Raises:
        ModelError, UsageError: input that cannot be used.
        RuntimeMissingError: onnxruntime is needed for `verify` or `bench` and is not installed.
    """
    started = time.perf_counter()
    model = reusable(model)
    where = find_target(target)
    pipeline = build_pipeline(
        where.recipe if recipe is None else recipe,
        passes=passes,
        skip=skip,
        freeze_initializers=freeze_initializers,
    )
    say = progress or silent
    say("reading the model", None)
    open_model = opener(model)
    guard = Guard(
        () if passes else pipeline.passes,
        where.provider,
        measure=bench,
        on_measure=lambda name: say(f"measuring whether {name} pays", None),
    )
    job = Job(
        model, open_model(), open_model, pipeline, where, guard, shapes, seed, say, frozen=freeze_initializers
    )
    samples = samples_for(job, data) if verify or bench else []
    if verify:
        outcome = job.run_under_proof(samples, stop_after)
    else:
        outcome = job.run(stop_after=stop_after)
        job.notes.append("the numbers were not verified: only structure was checked")
    if not outcome.settled:
        job.notes.append(f"the passes still changed the graph after {outcome.rounds} rounds")
    settings = job.settle(outcome.model, outcome.kind, samples, measure=bench and bool(samples))
    timing = _measure(job, outcome, settings, samples) if bench else None
    slower = timing is not None and timing.verdict == "slower"
    if slower:
        job.notes.append("left as it was: the rewritten model is measurably slower")
        settings = tuple(one for one in job.settings_for(job.original) if one.purpose == "correctness")
    rewritten = job.open_model() if slower else outcome.model
    if metadata and outcome.changes and not slower:
        applied = [step.name for step in outcome.steps if step.changes]
        record(rewritten, applied, fingerprint(model, job.original))
    sizes = {**(shapes or {}), **sizes_of(samples)}
    report = Report(
        source=source_of(model),
        target=where.name,
        passes=tuple(spelling(one) for one in pipeline.passes),
        seed=seed,
        versions=versions(),
        shapes=sizes,
        before=measure_size(job.original, sizes),
        after=measure_size(rewritten, sizes),
        steps=outcome.steps,
        left_out=outcome.left_out,
        rounds=outcome.rounds,
        left_as_it_was=slower or not outcome.changes,
        profits=tuple(guard.profits.values()),
        settings=settings,
        verdict=job.verdict,
        timing=timing,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
    return Result(rewritten, report, model)


def _measure(
    job: Job, outcome: Outcome, settings: Sequence[Setting], samples: Sequence[Feeds]
) -> Timing | None:
    """Time the original against the result, with its settings; None, with a note, where that cannot be."""
    if not samples or not (outcome.changes or settings):
        why = "nothing was changed" if samples else "there is no sample to run"
        job.notes.append(f"speed not measured: {why}")
        return None
    timing = job.time(job.model, outcome.model, samples, session_config(settings))
    gain = next((one.ratio for one in settings if one.ratio is not None), 1.0)
    if timing is not None and gain < 1 and timing.ratio > gain * _NOTICEABLE:
        without = timing.ratio / gain
        job.notes.append(f"without its settings the result takes about {without:.2f}x the original's time")
    return timing
