"""One training from a model to a model: what finetuning, distillation, pruning and QAT have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from onnxopt.api.common import record, silent, source_of, versions
from onnxopt.data.contract import contract_of
from onnxopt.errors import ModelError, UsageError
from onnxopt.graph import FLOATS, float_attr, nodes
from onnxopt.job import Progress
from onnxopt.metric import parse_drop
from onnxopt.model import ModelLike, fingerprint, load, reusable
from onnxopt.reporting import measure_size
from onnxopt.reporting.training import Score, TrainingReport
from onnxopt.result import Result
from onnxopt.training.initialization import initialize
from onnxopt.training.interpreter.module import GraphModule, to_torch
from onnxopt.training.interpreter.statistics import Follows
from onnxopt.training.interpreter.writing import write_back
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.losses import Objective, parse_loss
from onnxopt.training.loop.parallel import World, world
from onnxopt.training.loop.scoring import FileJudge, final_activations, find_metric, score
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.normalization import Estimate, fold_batchnorm, with_batchnorm
from onnxopt.training.recipe import Recipe
from onnxopt.training.samples.dataset import Dataset
from onnxopt.training.samples.sources import open_source
from onnxopt.training.samples.transforms import parse_transforms

__all__ = ["datasets_of", "train"]

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
    hooks: Sequence[Hook] = (),
    share: float = 1.0,
    reference: ModelLike | None = None,
    floor: ir.Model | None = None,
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
        hooks: what they add to the loop.
        share: what the recipe's loss is multiplied with; 0: hooks give all of it.
        reference: what metrics such as agreement compare with, where it is another one than `model`.
        floor: a model that the result has to be as good as, where it is another one than `model`.
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
    data, validation, test = datasets_of(recipe, original)
    with world(recipe.devices, recipe.shard) as where, _folder(folder) as place:
        begun = original if start is None else start
        prepared, sites = begun, tuple[str, ...]()
        if recipe.batchnorm:
            prepared, sites = with_batchnorm(begun, data.samples()[:_PROBED])
        module = to_torch(prepared, batch_statistics=_follows(recipe, prepared, where))
        hooks = [*hooks, *([Estimate()] if recipe.statistics == "estimate" else [])]
        initialize(module, prepared, recipe.init, recipe.seed)
        objective = _objective(recipe, original, data) if share or recipe.labels else None
        activations = final_activations(original)
        own = (one.metric(validation, test) for one in hooks if recipe.metric is None)
        metric = next(filter(None, own), None) or find_metric(
            recipe.metric, objective, activations, validation, test, model if reference is None else reference
        )
        sha256 = fingerprint(model, original)

        def finish(trained: nn.Module) -> ir.Model:
            assert isinstance(trained, GraphModule)
            done = write_back(trained, prepared)
            fold_batchnorm(done, sites)
            for hook in hooks:
                hook.written(done)
            record(done, [*filter(None, [done.metadata_props.get("onnxopt.passes")]), command], sha256)
            return done

        judge = FileJudge(metric, finish, place, writes=where.first)
        trainer = Trainer(
            module,
            _through(objective, module, share) if share else None,
            data,
            recipe,
            judge,
            world=where,
            hooks=hooks,
            folder=place if folder is not None else None,
            made_for=_identity(command, sha256, recipe, where),
            progress=show,
        )

        def scores(one: ModelLike) -> tuple[float, float]:
            found: tuple[float, float] = where.agreed(_both(metric, one) if where.first else None)
            return found

        show("scoring the original", None)
        before, begin = scores(model), scores(begun) if start is not None else None
        curves = trainer.fit(resume=resume)
        best = judge.best if judge.best is not None else load(place / "best.onnx")
        show("scoring the result", None)
        after = scores(best)
        choice, final = (
            Score(metric.name, before[i], after[i], metric.has_split and i == 1, begin[i] if begin else None)
            for i in range(2)
        )
        reason = _objection(final, recipe.max_drop)
        notes = [] if metric.has_split else [_SAME if validation is data else _SEEN]
        notes += [one.summary for one in module.stages if where.stages]
        notes += [note for hook in hooks for note in hook.notes]
        if floor is not None:
            least = scores(floor)[1]
            notes.append(f"without training: {metric.name} {least:.6g}")
            reason = reason or ("" if final.after >= least else f"training made it worse: {notes[-1]}")
        parameters = list(module.parameters())
        report = TrainingReport(
            command=command,
            source=source_of(model),
            input_sha256=sha256,
            recipe=recipe.to_dict(),
            seed=recipe.seed,
            versions={**versions(), "torch": torch.__version__},
            device=str(where),
            process=(where.rank, where.size),
            samples=(data.length, validation.length, test.length if test is not None else None),
            trained=(
                sum(one.numel() for one in trainer.trained.values()),
                sum(one.numel() for one in parameters),
            ),
            before=measure_size(original),
            after=measure_size(best),
            choice=choice,
            final=final,
            curves=vars(curves),
            best_epoch=curves.best + 1,
            steps=trainer.step,
            reason=reason,
            notes=tuple(notes),
            seconds=time.perf_counter() - started,
        )
    return Result(original if reason else best, report, model)


def datasets_of(recipe: Recipe, model: ir.Model) -> tuple[Dataset, Dataset, Dataset | None]:
    """The samples to train on, to choose by, and for the last word."""
    if recipe.data is None:
        raise UsageError("train: there is nothing to train on: give --data (data=)")
    contract, transforms = contract_of(model), parse_transforms(recipe.transforms)

    def opened(source: Any) -> Dataset:
        found = open_source(source, labels=recipe.labels, preprocess=recipe.preprocess)
        return Dataset(
            found, contract, recipe.labels, transforms, recipe.seed, recipe.workers, recipe.shuffle
        )

    data = opened(recipe.data)
    test = opened(recipe.test) if recipe.test is not None else None
    if recipe.validation is not None:
        return data, opened(recipe.validation), test
    data, held_out = data.split(recipe.holdout)
    return data, held_out or data, test


def _follows(recipe: Recipe, model: ir.Model, where: World) -> Follows:
    asked = recipe.statistics in ("batch", "estimate")
    found = [node for node in nodes(model) if node.op_type == "BatchNormalization"]
    if asked and not found:
        why = "what is trained has no BatchNormalization (qat and prune --channels fold it)"
        raise UsageError(f"statistics={recipe.statistics}: {why}")
    if recipe.statistics == "batch" and any(float_attr(node, "momentum", 0.9) == 1 for node in found):
        raise UsageError("statistics=batch: with the momentum 1 of a node they would stay: take estimate")
    follows = asked or (recipe.batchnorm and recipe.statistics == "auto")
    return "union" if follows and where.size > 1 else follows


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


def _both(metric: Any, model: ModelLike) -> tuple[float, float]:
    found = score(metric, model)
    return found, score(metric, model, "final") if metric.has_split else found


def _objection(final: Score, max_drop: str) -> str:
    """Why the result is not to be written; empty where it is."""
    if final.start is not None and final.after <= final.start:
        return f"{final.summary}: training gained nothing"
    if max_drop and not parse_drop(max_drop).allows(final.before, final.after):
        return f"{final.summary}; max_drop is {max_drop}"
    return ""


def _identity(command: str, sha256: str, recipe: Recipe, where: World) -> str:
    """What a checkpoint is of: model, training, and how many share it."""
    options = {name: value for name, value in recipe.to_dict().items() if name not in _NO_MATTER}
    text = json.dumps([command, sha256, options, where.size], sort_keys=True)
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
