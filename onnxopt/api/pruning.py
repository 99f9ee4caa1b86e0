"""Prune a model: cut, clean up, say what it saves and what it loses; as much as a budget allows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.api.common import opened, record, silent, sizes_of, source_of, versions
from onnxopt.api.packing import packed_sizes
from onnxopt.api.preparation import samples_of
from onnxopt.api.trials import Ended, Trials, judge_of, prepared_for
from onnxopt.calibration import split
from onnxopt.claims import Pass, kind_of, spelling
from onnxopt.data import Feeds, FeedSource
from onnxopt.errors import UsageError
from onnxopt.job import Job, Progress
from onnxopt.metric import Metric, parse_drop
from onnxopt.model import ModelLike, fingerprint
from onnxopt.pipeline import Pipeline
from onnxopt.pruning.search import Informed, Passes, up_to
from onnxopt.pruning.weights import sparsity
from onnxopt.recipe import parse_passes
from onnxopt.reporting import measure_size
from onnxopt.reporting.pruning import PruningReport
from onnxopt.result import Result
from onnxopt.targets import find_target

__all__ = ["prune"]


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
    asked, where = _parsed(passes), find_target(target)
    budget = parse_drop(max_drop) if max_drop is not None else None
    _check_latency(latency, bench)
    pipeline = Pipeline(asked, rounds=1)
    job = opened(model, pipeline, where, shapes, seed, progress or silent, frozen=freeze_initializers)
    samples = samples_of(job, data, "prune")
    if data is not None:
        _require_finite(samples)
    fitted, held_out = split(samples)
    left_open = {
        "samples": None if data is None else fitted,
        "shapes": {**(shapes or {}), **sizes_of(samples)},
        "multiple": where.multiple,
        "masks": masks,
    }
    ready = _ready(job, left_open, latency)
    job.progress("running the original", None)
    judge = judge_of(job, held_out, metric, budget)
    dense = prepared_for(job, held_out)
    work = Trials(job, samples, fitted, held_out, judge, dense, budget is not None, latency)
    ended = work.ended(work.search(ready), bench=bench)
    best, sha256 = ended.searched.best, fingerprint(job.model, job.original)
    result = job.open_model() if ended.reason else best.model
    if metadata and not ended.reason:
        record(result, [spelling(one) for one in best.passes], sha256)
    return Result(result, _report(work, ended, sha256, synthetic=data is None, started=started), job.model)


def _parsed(passes: str | Sequence[str | ir.passes.PassBase]) -> Passes:
    """Raises UsageError where none of them loses anything: such are for `optimize`."""
    given = (passes,) if isinstance(passes, str) else passes
    parts = (parse_passes(one) if isinstance(one, str) else (one,) for one in given)
    found = tuple(itertools.chain.from_iterable(parts))
    if not any(kind_of(one) == "lossy" for one in found):
        raise UsageError("prune: say what to prune, as prune-channels{macs=0.5}; `onnxopt passes` lists all")
    return found


def _check_latency(latency: float | None, bench: bool) -> None:
    if latency is not None and not bench:
        raise UsageError("prune: latency is measured, and measuring is switched off (--no-bench)")
    if latency is not None and not 0 < latency < 1:
        raise UsageError(f"prune: latency is {latency:g}; expected a share of the time between 0 and 1")


def _require_finite(samples: Sequence[Feeds]) -> None:
    """Raises UsageError: what is fitted to NaN is NaN, and what is judged by it is always right."""
    for number, feeds in enumerate(samples):
        for name, array in feeds.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                found = f"prune: sample {number}: input {name!r} holds NaN or infinite numbers"
                raise UsageError(f"{found}; leave such samples out, or give large finite numbers")


def _ready(job: Job, left_open: Mapping[str, Any], latency: float | None) -> Passes:
    """The passes with what they leave open, as far as they have such fields, and with an amount.

    Raises UsageError where one of them needs samples.
    """
    passes, usual = [], latency / 2 if latency is not None else 0.5
    for one in job.pipeline.passes:
        if isinstance(one, Pass):
            filled = {name: value for name, value in left_open.items() if getattr(one, name, "") is None}
            one = replace(one, **filled)
        if isinstance(one, Informed):
            one.require_samples(job.open_model())
        passes.append(up_to(one, usual))
    return tuple(passes)


def _report(work: Trials, ended: Ended, sha256: str, *, synthetic: bool, started: float) -> PruningReport:
    """The report; `started` is when the work began, of `time.perf_counter`."""
    job, best = work.job, ended.searched.best
    sizes = {**(job.shapes or {}), **sizes_of(work.samples)}
    packed = None if ended.reason else packed_sizes(job.model, best.model)
    if packed is None and not ended.reason:
        job.notes.append("not packed to see its size: that takes onnxopt[pack], and no more than 256 MB")
    return PruningReport(
        source=source_of(job.model),
        input_sha256=sha256,
        target=job.target.name,
        seed=job.seed,
        versions=versions(),
        samples=(len(work.fitted), len(work.held_out)),
        synthetic=synthetic,
        before=measure_size(job.original, sizes),
        after=measure_size(best.model, sizes),
        searched=ended.searched,
        layers=sparsity(best.model),
        packed=packed,
        settings=ended.settings,
        timing=ended.timing,
        reason=ended.reason,
        notes=tuple(job.notes),
        seconds=time.perf_counter() - started,
    )
