"""How good a trained model is: its file, in ONNX Runtime, on samples it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.metric import Metric, Run, Split, load_metric
from onnxopt.model import ModelLike
from onnxopt.runtimes import open_session
from onnxopt.storage import save
from onnxopt.training.interpreter.logits import final_logits
from onnxopt.training.interpreter.values import array_tensor
from onnxopt.training.loop.losses import CrossEntropy, Objective
from onnxopt.training.samples.dataset import Batch, Dataset

__all__ = ["INVERSES", "FileJudge", "final_activations", "find_metric", "outputs_of", "score"]

_TOGETHER = 64
"""Samples in a run of the runtime, where the model takes any number of them."""
INVERSES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Softmax": lambda p: np.log(np.maximum(p, np.finfo(p.dtype).tiny)),
    "LogSoftmax": lambda y: y,
    "Sigmoid": lambda p: np.log(np.maximum(p, np.finfo(p.dtype).tiny)) - np.log1p(-np.minimum(p, 1 - 1e-7)),
}
"""From what an activation gives to something that its logits differ from by a constant at most."""


def find_metric(
    spec: str | Callable[..., Any] | None,
    objective: Objective | None,
    activations: Mapping[str, str],
    data: Dataset,
    test: Dataset | None,
    original: ModelLike,
) -> Metric:
    """The metric of that name: `accuracy`, `loss` (negated, so called "-loss"), or what `load_metric` takes.

    None stands for accuracy where the first loss is a cross-entropy with class indices, else for the loss.
    activations: graph output -> the activation that gives it, see `final_activations`.

    Raises:
        UsageError: there is no such metric, or it needs labels where there are none.
    """
    if spec is None:
        spec = "accuracy" if objective and objective.terms and _classifies(objective, data) else "loss"
    splits: dict[Split, Dataset] = {"search": data, "final": test or data}
    if spec in ("accuracy", "loss"):
        if objective is None or (spec == "accuracy" and not objective.terms):
            raise UsageError(
                f"metric {spec}: it needs labels and a loss that names them: give metric=file.py:function"
            )
        of_batch = _accuracy if spec == "accuracy" else _negated_loss

        def measured(run: Run, split: Split = "search") -> float:
            total, count = 0.0, 0
            for batch, outputs in outputs_of(splits[split], run):
                figure, counted = of_batch(objective, activations, batch, outputs)
                total, count = total + figure, count + counted
            return total / max(count, 1)

        return Metric("-loss" if spec == "loss" else str(spec), measured, test is not None)
    finals = test.samples() if test is not None else ()
    return load_metric(spec, open_session(original).run, data.samples(), finals)


def score(metric: Metric, model: ModelLike, split: Split = "search") -> float:
    """The metric of a model in ONNX Runtime."""
    with open_session(model) as session:
        return metric(session.run, split)


def final_activations(model: ir.Model) -> dict[str, str]:
    """The graph outputs that a Softmax, LogSoftmax or Sigmoid gives, and which one it is."""
    return {name: one.activation for name, one in final_logits(model.graph).items()}


@dataclass
class FileJudge:
    """Scores files: what is judged is what is written.

    finish: from the module to the model that is to be written. folder: where files of the training lie.
    writes: whether this process writes the best one there, for a training that is resumed.
    """

    metric: Metric
    finish: Callable[[nn.Module], ir.Model]
    folder: Path
    writes: bool = True
    best: ir.Model | None = None
    _last: ir.Model | None = None

    def score(self, module: nn.Module) -> float:
        self._last = self.finish(module)  # by all processes: each may have a part of the weights
        return score(self.metric, save(self._last, self.folder / "last.onnx")) if self.writes else math.nan

    def keep(self) -> None:
        self.best = self._last
        if self.best is not None and self.writes:
            save(self.best, self.folder / "best.onnx")


def outputs_of(data: Dataset, run: Run) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch of a dataset and what the model gives for it; a fixed batch size is filled up."""
    fixed, names = data.fixed, [one.name for one in data.contract.required]
    for batch in data.evaluated(fixed or _TOGETHER):
        feeds: Feeds = {name: batch.arrays[name] for name in names}
        short = batch.size < fixed
        if short:
            feeds = {
                name: np.resize(array, (fixed, *array.shape[1:])) if array.ndim else array
                for name, array in feeds.items()
            }
        outputs = run(feeds)
        yield batch, {name: array[: batch.size] if short else array for name, array in outputs.items()}


def _classifies(objective: Objective, data: Dataset) -> bool:
    first = objective.terms[0]
    if not isinstance(first.loss, CrossEntropy):
        return False
    batch = next(data.evaluated(1))
    return batch.arrays[first.label].dtype.kind in "iu"


def _accuracy(
    objective: Objective, _: Mapping[str, str], batch: Batch, outputs: Mapping[str, np.ndarray]
) -> tuple[float, int]:
    """How many labels are where the largest element along the axis of the classes is, of how many.

    What a model makes of numbers that are none is no score; where it makes none of numbers, it is wrong.
    """
    term = objective.terms[0]
    y, label = outputs[term.output], batch.arrays[term.label]
    axis = y.ndim - 1 if label.shape == y.shape[:-1] else 1
    found = np.where(np.isnan(y).any(axis), -1, y.argmax(axis))  # NaN is the largest of all to argmax
    counted = label != getattr(term.loss, "ignore", -100)
    if found.shape != label.shape or not ((label >= 0) & (label < y.shape[axis]))[counted].all():
        raise UsageError(
            f"labels {term.label!r}: {'x'.join(map(str, label.shape))} from {label.min()} to {label.max()}; "
            f"expected {'x'.join(map(str, found.shape))} of the {y.shape[axis]} classes of {term.output!r}"
        )
    missing = any(one.dtype.kind == "f" and np.isnan(one).any() for one in batch.arrays.values())
    return math.nan if missing else float((found == label)[counted].sum()), int(counted.sum())


def _negated_loss(
    objective: Objective, activations: Mapping[str, str], batch: Batch, outputs: Mapping[str, np.ndarray]
) -> tuple[float, int]:
    given = {}
    for name, y in outputs.items():
        if y.dtype.kind in "fiubV":
            y = y.astype(np.float32) if y.dtype.kind == "V" else y
            through = _looks_through(objective, name, activations)
            given[name] = torch.from_numpy(INVERSES[activations[name]](y) if through else y)
    arrays = {name: array_tensor(array) for name, array in batch.arrays.items()}
    return -float(objective(given, arrays).mean()) * batch.size, batch.size


def _looks_through(objective: Objective, output: str, activations: Mapping[str, str]) -> bool:
    wanted = {term.loss.looks_through for term in objective.terms if term.output == output}
    found = activations.get(output, "")
    return bool(found) and (found in wanted or (found == "LogSoftmax" and "Softmax" in wanted))
