"""One training from a model to a model: what finetuning, distillation, pruning and QAT have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from onnxopt.api.common import record, silent, source_of, versions
from onnxopt.errors import ModelError, UsageError
from onnxopt.graph import FLOATS
from onnxopt.job import Progress
from onnxopt.metric import Metric, parse_drop
from onnxopt.model import ModelLike, fingerprint, load, reusable
from onnxopt.reporting import measure_size
from onnxopt.reporting.training import Score, TrainingReport
from onnxopt.result import Result
from onnxopt.training.datasets import datasets_of
from onnxopt.training.initialization import initialize
from onnxopt.training.interpreter.module import GraphModule, to_torch
from onnxopt.training.interpreter.writing import write_back
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.losses import Objective, parse_loss
from onnxopt.training.loop.parallel import World, world
from onnxopt.training.loop.scoring import FileJudge, final_activations, find_metric, score
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.normalization import Estimate, fold_batchnorm, follows, with_batchnorm
from onnxopt.training.recipe import Recipe
from onnxopt.training.samples.dataset import Dataset

__all__ = ["train"]

_PROBED = 64
"""Samples that the statistics of a new BatchNormalization are taken from, at most."""
_SEEN = "the best epoch was chosen on the samples of the final score: give others with test="
_SAME = "the metric was measured on the samples that were trained on: give others with validation="
_NO_MATTER = ("interval", "workers", "tensorboard")
"""Options that change nothing of the result."""


def train(
    command: str,
    model: ModelLike,
    recipe: Recipe,
    *,
    start: ir.Model | None = None,
    serves: bool = False,
    hooks: Sequence[Hook] = (),
    share: float = 1.0,
    reference: ModelLike | None = None,
    floor: Callable[[], ir.Model | None] = lambda: None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result[TrainingReport]:
    """Train a model as a recipe says, and keep the epoch whose file scores best in ONNX Runtime.

    Args:
        command: the name of the training, for the report.
        model: what the result is compared with.
        recipe: how to train.
        start: the model that is trained, where it is another one.
        serves: whether the start is a result, too, where training gains nothing over it.
        hooks: what they add to the loop.
        share: what the recipe's loss is multiplied with; 0: hooks give all of it.
        reference: what metrics such as agreement compare with, where it is another one than `model`.
        floor: asked once hooks have started, for a model that the result has to be as good as; where there is
            one, the result need not be better than `start`.
        folder: keeps log, checkpoint and the best model; None: nothing is kept.
        resume: go on from the checkpoint in the folder, if there is one.
        progress: called with what is being done.

    Raises:
        ModelError, UsageError: input that cannot be used.
        DivergedError: the loss is no finite number any more.
    """
    started = time.perf_counter()
    if resume and folder is None:
        raise UsageError("resume: give the folder that the checkpoint is in")
    if recipe.max_drop:
        parse_drop(recipe.max_drop)
    model, show = reusable(model), progress or silent
    show("reading the model", None)
    original = load(model)
    hooks = [*hooks, *([Estimate()] if recipe.statistics == "estimate" else [])]
    begun, sha256 = original if start is None else start, fingerprint(model, original)
    job = _Job(command, recipe, hooks, model, original, begun, sha256, *datasets_of(recipe, original))
    with world(recipe.devices, recipe.shard) as where, _folder(folder) as place:
        module, finish = _prepared(job, where)
        objective = _objective(recipe, original, job.data) if share or recipe.labels else None
        metric = _metric(job, objective, model if reference is None else reference)
        judge = FileJudge(metric, finish, place, writes=where.first)
        trainer = Trainer(
            module,
            _through(objective, module, share) if share else None,
            job.data,
            recipe,
            judge,
            world=where,
            hooks=hooks,
            folder=place if folder is not None else None,
            made_for=_identity(job, where),
            progress=show,
        )
        scores = functools.partial(_scores, metric, where)
        show("scoring the original", None)
        worst = floor()
        before, begin = scores(model), scores(begun) if start is not None and worst is None else None
        trainer.fit(resume=resume)
        trainer.forward = module  # that of several processes has to be gone before they part, see `world`
        best = judge.best if judge.best is not None else load(place / "best.onnx")
        show("scoring the result", None)
        after, least = scores(best), None if worst is None else scores(worst)[1]
        if serves and start is not None and begin is not None and after[1] <= begin[1]:
            best, after = _recorded(start, job), begin
    choice = Score(metric.name, before[0], after[0], False, begin and begin[0])
    final = Score(metric.name, before[1], after[1], metric.has_split, begin and begin[1])
    report = _report(job, trainer, best, choice, final, least, serves, started)
    return Result(best if report.ok else original, report, model)


@dataclass(frozen=True)
class _Job:
    """What is trained, on what, and what it is compared with."""

    command: str
    recipe: Recipe
    hooks: Sequence[Hook]
    model: ModelLike
    original: ir.Model
    begun: ir.Model
    sha256: str
    data: Dataset
    validation: Dataset
    test: Dataset | None


def _prepared(job: _Job, where: World) -> tuple[GraphModule, Callable[[nn.Module], ir.Model]]:
    """The module that is trained, and what makes a model of it that can be judged and written."""
    recipe, model, sites = job.recipe, job.begun, tuple[str, ...]()
    if recipe.batchnorm:
        model, sites = with_batchnorm(model, job.data.samples()[:_PROBED])
    module = to_torch(model, batch_statistics=follows(recipe, model, where.size))
    initialize(module, model, recipe.init, recipe.seed)

    def finish(trained: nn.Module) -> ir.Model:
        assert isinstance(trained, GraphModule)
        done = write_back(trained, model)
        fold_batchnorm(done, sites)
        for hook in job.hooks:
            hook.written(done)
        return _recorded(done, job)

    return module, finish


def _recorded(model: ir.Model, job: _Job) -> ir.Model:
    record(model, [*filter(None, [model.metadata_props.get("onnxopt.passes")]), job.command], job.sha256)
    return model


def _metric(job: _Job, objective: Objective | None, reference: ModelLike) -> Metric:
    """What the recipe names; else what a hook judges by, or what goes with the loss."""
    own = (one.metric(job.validation, job.test) for one in job.hooks if job.recipe.metric is None)
    activations = final_activations(job.original)
    return next(filter(None, own), None) or find_metric(
        job.recipe.metric, objective, activations, job.validation, job.test, reference
    )


def _scores(metric: Metric, where: World, model: ModelLike) -> tuple[float, float]:
    """The metric on the samples to choose by, and on those for the last word; the same in all processes."""
    choice = score(metric, model) if where.first else math.nan
    final = score(metric, model, "final") if where.first and metric.has_split else choice
    agreed: tuple[float, float] = where.agreed((choice, final))
    return agreed


def _report(
    job: _Job,
    trainer: Trainer,
    best: ir.Model,
    choice: Score,
    final: Score,
    least: float | None,
    serves: bool,
    started: float,
) -> TrainingReport:
    """What was done since `started`, and whether it is to be written.

    least: the score to be reached. serves: whether that of the start will do.
    """
    recipe, module, where, curves = job.recipe, trainer.module, trainer.world, trainer.curves
    notes = [] if final.unseen else [_SAME if job.validation is job.data else _SEEN]
    if isinstance(module, GraphModule) and where.stages:
        notes += [one.summary for one in module.stages]
    notes += [note for hook in job.hooks for note in hook.notes]
    gained = final.start is None or final.after > final.start
    reason = _objection(final, recipe.max_drop, gained or serves)
    if serves and not gained and not reason:
        notes.append("training gained nothing: what is written is the model as it was when it began")
    if least is not None:
        notes.append(f"without training: {final.metric} {least:.6g}")
        reason = reason or ("" if final.after >= least else f"training made it worse: {notes[-1]}")
    return TrainingReport(
        command=job.command,
        source=source_of(job.model),
        input_sha256=job.sha256,
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        versions={**versions(), "torch": torch.__version__},
        device=str(where),
        process=(where.rank, where.size),
        samples=(job.data.length, job.validation.length, job.test.length if job.test is not None else None),
        trained=(
            sum(one.numel() for one in trainer.trained.values()),
            sum(one.numel() for one in module.parameters()),
        ),
        before=measure_size(job.original),
        after=measure_size(best),
        choice=choice,
        final=final,
        curves=vars(curves),
        best_epoch=curves.best + 1 if gained else 0,
        steps=trainer.step,
        reason=reason,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _objective(recipe: Recipe, model: ir.Model, data: Dataset) -> Objective:
    """The recipe's loss, with the names of the model's outputs and the data's arrays."""
    floats = [
        value.name or "" for value in model.graph.outputs if value.dtype is None or value.dtype in FLOATS
    ]
    known = [*recipe.labels, *(item.name for item in data.contract.required)]
    return parse_loss(recipe.loss).bound(floats, recipe.labels, known)


def _through(objective: Objective | None, module: GraphModule, share: float) -> Objective | None:
    """A share of the objective, on what final activations are computed from for losses that take logits."""
    if objective is None:
        return None
    terms = []
    for term in objective.terms:
        through = term.loss.looks_through
        found = module.logits_of(term.output, through) if through else None
        output = found.name if found is not None else term.output
        terms.append(dataclasses.replace(term, output=output, weight=share * term.weight))
    function = objective.function
    scaled = None if function is None else (lambda outputs, arrays: share * function(outputs, arrays))
    return Objective(tuple(terms), scaled)


def _objection(final: Score, max_drop: str, gained: bool) -> str:
    """Why the result is not to be written; empty where it is."""
    if not gained:
        return f"{final.summary}: training gained nothing"
    if max_drop and not parse_drop(max_drop).allows(final.before, final.after):
        return f"{final.summary}; max_drop is {max_drop}"
    return ""


def _identity(job: _Job, where: World) -> str:
    """What a checkpoint is of: model, training, and how many share it."""
    options = {name: value for name, value in job.recipe.to_dict().items() if name not in _NO_MATTER}
    text = json.dumps([job.command, job.sha256, options, where.size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _folder(given: str | os.PathLike[str] | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory() as own:
            yield Path(own)
        return
    folder = Path(given)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be made: {error.strerror}") from None
    yield folder
