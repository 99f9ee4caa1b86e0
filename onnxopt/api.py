"""The workflows behind the public functions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import onnxopt
from onnxopt.benchmarking import Timing
from onnxopt.benchmarking import bench as measure
from onnxopt.claims import Kind, spelling
from onnxopt.data import Feeds, read_feeds, synthesize
from onnxopt.errors import NoSamplesError, ProviderError
from onnxopt.graph import domains
from onnxopt.model import ModelLike, fingerprint, opener, reusable
from onnxopt.pipeline import Outcome, Pipeline, Proof
from onnxopt.protobuf import dump
from onnxopt.recipe import build_pipeline
from onnxopt.reporting import Report, measure_size
from onnxopt.runtimes import UnsupportedModelError
from onnxopt.storage import save
from onnxopt.targets import STANDARD, Target, find_target
from onnxopt.verification import Baseline, Verdict

__all__ = ["Result", "optimize"]

_TIMED = 4
"""Samples that latency is measured on, at most."""

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1) where that is known."""


@dataclass(frozen=True)
class Result:
    """An optimized model and the report on it."""

    graph: ir.Model
    report: Report
    _source: ModelLike

    @property
    def model(self) -> bytes | onnx.ModelProto | ir.Model:
        """The model as the kind that was given: bytes for bytes or a file, an `ir.Model` for a path.

        Raises:
            ModelError: bytes or a `ModelProto` were given and would now exceed 2 GB.
        """
        if isinstance(self._source, str | os.PathLike | ir.Model):
            return self.graph
        proto = dump(self.graph)
        return (
            proto
            if isinstance(self._source, onnx.ModelProto)
            else proto.SerializeToString(deterministic=True)
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model atomically, see `onnxopt.save`."""
        return save(self.graph, path)


def optimize(
    model: ModelLike,
    *,
    target: str = "cpu",
    recipe: str | os.PathLike[str] | Pipeline | None = None,
    passes: str | Sequence[str | ir.passes.PassBase] = (),
    skip: Sequence[str] = (),
    freeze_initializers: bool = False,
    stop_after: int | None = None,
    data: str | os.PathLike[str] | Iterable[Feeds] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    verify: bool = True,
    bench: bool = True,
    metadata: bool = True,
    progress: Progress | None = None,
) -> Result:
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
    say = progress or _silent
    say("reading the model", None)
    open_model = opener(model)
    job = _Job(model, open_model(), open_model, pipeline, where, shapes, seed, say)
    samples = _samples(job, data) if verify or bench else []
    if verify:
        outcome, verdict = _rewrite_and_prove(job, samples, stop_after, freeze_initializers)
    else:
        outcome, verdict = job.run(stop_after=stop_after), None
        job.notes.append("the numbers were not verified: only structure was checked")
    if not outcome.settled:
        job.notes.append(f"the passes still changed the graph after {outcome.rounds} rounds")
    timing = _measure(job, outcome, where.provider, samples) if bench else None
    slower = timing is not None and timing.verdict == "slower"
    if slower:
        job.notes.append("left as it was: the rewritten model is measurably slower")
    rewritten = job.open_model() if slower else outcome.model
    if metadata and outcome.changes and not slower:
        _record(rewritten, outcome, fingerprint(model, job.original))
    sizes = {**(shapes or {}), **_sizes_of(samples)}
    report = Report(
        source=os.fspath(model) if isinstance(model, str | os.PathLike) else f"({type(model).__name__})",
        target=where.name,
        passes=tuple(spelling(one) for one in pipeline.passes),
        seed=seed,
        versions=_versions(),
        shapes=sizes,
        before=measure_size(job.original, sizes),
        after=measure_size(rewritten, sizes),
        steps=outcome.steps,
        left_out=outcome.left_out,
        rounds=outcome.rounds,
        left_as_it_was=slower or not outcome.changes,
        verdict=verdict,
        timing=timing,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
    return Result(rewritten, report, model)


def _samples(job: _Job, data: str | os.PathLike[str] | Iterable[Feeds] | None) -> Sequence[Feeds]:
    """The user's samples, or synthetic ones; none, with a note, where none could be made up."""
    if data is not None:
        return read_feeds(data, job.model)
    job.progress("making up samples", None)
    try:
        return synthesize(job.model, seed=job.seed, shapes=job.shapes)
    except NoSamplesError as error:
        job.notes.append(str(error))
        return []


def _sizes_of(samples: Sequence[Feeds]) -> dict[str, tuple[int, ...]]:
    """Input shapes of the first sample."""
    return {name: np.shape(array) for name, array in samples[0].items()} if samples else {}


def _silent(_what: str, _share: float | None) -> None:
    """The progress of a caller who asked for none."""


@dataclass(frozen=True)
class _Job:
    """What the steps of one call of `optimize` share."""

    model: ModelLike
    original: ir.Model
    open_model: Callable[[], ir.Model]
    pipeline: Pipeline
    target: Target
    shapes: Mapping[str, Sequence[int]] | None
    seed: int
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def run(self, *, prove: Proof | None = None, stop_after: int | None = None) -> Outcome:
        """Run the pipeline, and tell of each pass."""
        known = domains(self.original) | STANDARD

        def judge(candidate: ir.Model, kind: Kind) -> str | None:
            strange = set() if self.target.contrib else domains(candidate) - known
            if strange:
                return f"target {self.target.name} takes no operators of {', '.join(sorted(strange))}"
            return prove(candidate, kind) if prove else None

        return self.pipeline.run(
            self.open_model,
            prove=judge,
            stop_after=stop_after,
            on_pass=lambda name: self.progress(f"rewriting: {name}", None),
        )


def _rewrite_and_prove(
    job: _Job, samples: Sequence[Feeds], stop_after: int | None, frozen: bool
) -> tuple[Outcome, Verdict]:
    """Run the pipeline under proof; where nothing can be shown of the original, make no rewrite."""
    job.progress("running the original", None)
    baseline = Baseline.measure(job.model, samples)
    verdict: Verdict | None = None

    def prove(candidate: ir.Model, kind: Kind) -> str | None:
        nonlocal verdict
        job.progress("proving the numbers", None)
        verdict = baseline.compare(candidate, kind=kind, frozen=frozen)
        return None if verdict.ok else verdict.reason

    if baseline.unprovable:
        job.notes.append(
            "left as it was: nothing can be proved of this model; --no-verify rewrites it unproved"
        )
        stop_after = 0
    outcome = job.run(prove=prove, stop_after=stop_after)
    if verdict is None or not outcome.changes:
        verdict = baseline.compare(job.model)
    return outcome, verdict


def _measure(job: _Job, outcome: Outcome, provider: str, samples: Sequence[Feeds]) -> Timing | None:
    """Time the original and the result on the target's provider; None, with a note, where that cannot be."""
    if not outcome.changes or not samples:
        why = "nothing was changed" if samples else "there is no sample to run"
        job.notes.append(f"speed not measured: {why}")
        return None
    try:
        return measure(
            job.model,
            outcome.model,
            provider=provider,
            feeds=samples[:_TIMED],
            seed=job.seed,
            progress=lambda share: job.progress("measuring the speed", share),
        )
    except (ProviderError, UnsupportedModelError) as error:
        job.notes.append(f"speed not measured: {error}")
        return None


def _record(model: ir.Model, outcome: Outcome, input_sha256: str) -> None:
    """Write into the model's metadata what was done to it, by which versions, and to which input."""
    applied = [step.name for step in outcome.steps if step.changes]
    versions = " ".join(f"{name}={version}" for name, version in _versions().items())
    model.metadata_props["onnxopt.passes"] = ",".join(applied)
    model.metadata_props["onnxopt.versions"] = versions
    model.metadata_props["onnxopt.input_sha256"] = input_sha256


def _versions() -> dict[str, str]:
    """The versions that the result depends on, as far as they are installed."""
    found = {"onnxopt": onnxopt.__version__}
    for name in ("onnx", "onnx-ir", "numpy", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
