"""Finetune a model with a loss of its task."""

from __future__ import annotations

import os
from typing import Any

from onnxopt.job import Progress
from onnxopt.model import ModelLike
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.training.recipe import Recipe, read_recipe
from onnxopt.training.work import train

__all__ = ["finetune"]


def finetune(
    model: ModelLike,
    data: Any = None,
    *,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Train the graph's own weights; the result is the same graph.

        finetune("m.onnx", "train.npz", labels="y", loss="cross-entropy", epochs=5)

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        data: what to train on, see `onnxopt.training.samples.sources.open_source`.
        recipe: a TOML file or a `Recipe`, whose options are those of `options` that are not given here.
        folder: keeps log, checkpoint and the best model; None: nothing is kept.
        resume: go on from the checkpoint in the folder, if there is one; the result is the same to the bit.
        progress: called with what is being done, and how much of it is done.
        options: the fields of `Recipe`.

    Returns:
        The best epoch's model; the model as it was, and `report.ok` false, where that lost more of the
        metric than `max_drop`.

    Raises:
        ModelError, UsageError: input that cannot be used, or an unknown option.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen = read_recipe(Recipe, recipe, given)
    return train("finetune", model, chosen, folder=folder, resume=resume, progress=progress)
