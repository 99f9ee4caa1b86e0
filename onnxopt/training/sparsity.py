"""Prune and train: weights or whole channels go, at once or by and by, and the rest learns without them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from onnxopt.job import Progress
from onnxopt.model import ModelLike, load, reusable
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.training.channels import ChannelMasks, followable
from onnxopt.training.distillation import train_taught
from onnxopt.training.kinds import PruneRecipe
from onnxopt.training.masks import Masks
from onnxopt.training.recipe import read_recipe

__all__ = ["prune", "recover"]


def prune(
    model: ModelLike,
    data: Any = None,
    *,
    recipe: PruneRecipe | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Set weights to zero while training what is left; the result is the same graph.

        prune("m.onnx", "train.npz", labels="y", sparsity=0.9, ramp="cubic")
        prune("m.onnx", "inputs.npz", channels="macs=0.5,score=obs", ramp="cubic")

    Arguments are those of `finetune`; options are the fields of `PruneRecipe`. Without labels and teachers
    the model as it was is the teacher.

    Returns:
        The best epoch's model, with its zeros; the model as it was, and `report.ok` false, where that is
        worse than pruning alone, or lost more of the metric than `max_drop`.

    Raises:
        ModelError, UsageError: input that cannot be used, an unknown option, or nothing to prune.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen = read_recipe(PruneRecipe, recipe, given)
    model = reusable(model)
    if not chosen.labels and not chosen.teachers:
        chosen = dataclasses.replace(chosen, teacher=model)
    return _train("prune", model, chosen, folder=folder, resume=resume, progress=progress)


def recover(
    pruned: ModelLike,
    original: ModelLike,
    data: Any,
    *,
    recipe: PruneRecipe | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Train a pruned model to say what it said before; what is zero stays zero.

    Data, teachers and all else that the recipe names comes before `data` and the original.

    Raises: as `prune` does.
    """
    asked = read_recipe(PruneRecipe, recipe, options)
    chosen = dataclasses.replace(
        asked,
        data=data if asked.data is None else asked.data,
        teacher=asked.teachers or (reusable(original),),
        sparsity=0.0,
        nm="",
        channels="",
        max_drop="0",
    )
    return _train("recover", reusable(pruned), chosen, progress=progress)


def _train(command: str, model: ModelLike, recipe: PruneRecipe, **options: Any) -> Result[TrainingReport]:
    start = followable(model) if recipe.channels else None
    masks = Masks(recipe, load(model)) if start is None else ChannelMasks(recipe, start)
    return train_taught(
        command, model, recipe, start=start, hooks=[masks], floor=lambda: masks.floor, **options
    )
