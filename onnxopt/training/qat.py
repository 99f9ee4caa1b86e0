"""Quantization-aware training: a quantized graph is trained as it is, scales included, and stays that graph.

Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153. Without labels the float model is
the teacher (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.api.common import silent
from onnxopt.api.preparation import prepare, require_opset, settings_for
from onnxopt.calibration import split
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import FLOATS, nodes
from onnxopt.job import Progress
from onnxopt.model import ModelLike, load, opener, reusable
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.branches import name_values_apart
from onnxopt.quantization.entire import quantize_entirely
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.keep import kept_sites, veto_of
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Settings
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.targets import find_target
from onnxopt.training.hooks import Hook
from onnxopt.training.losses import Objective, parse_loss
from onnxopt.training.module import GraphModule, to_torch
from onnxopt.training.quantizers import Quantizers
from onnxopt.training.recipe import QatRecipe, read_recipe
from onnxopt.training.work import datasets_of, train

if TYPE_CHECKING:
    from onnxopt.training.loop import Trainer

__all__ = ["train_qat"]

_OF_TEACHER = "teacher: "
"""In front of the names of the teacher's outputs."""


def train_qat(
    model: ModelLike,
    data: Any = None,
    *,
    recipe: QatRecipe | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[TrainingReport]:
    """Train a quantized graph, or quantize a float one and train that; the result is the same QDQ graph.

        train_qat("m.onnx", "train.npz", labels="y", weights="int4", epochs=5)

    Without labels it learns to give what the float model gives.

    Args:
        model: in floating point, or with QuantizeLinear and DequantizeLinear, whoever wrote them.
        data, recipe, folder, resume, progress: as of `finetune`.
        options: the fields of `QatRecipe`.

    Returns:
        The best epoch's model; the float model as it was, and `report.ok` false, where training gained
        nothing over the start, or lost more of the float model's metric than `max_drop`.

    Raises:
        ModelError, UsageError: input that cannot be used, or an unknown option.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen, show = read_recipe(QatRecipe, recipe, given), progress or silent
    model = reusable(model)
    original = load(model)
    is_quantized = any(node.op_type == "DequantizeLinear" for node in nodes(original))
    floats = chosen.teacher if is_quantized else model
    if not chosen.labels and floats is None:
        raise UsageError("qat: without labels it learns from the float model: give that with --teacher")
    prepared = settings = None
    if floats is not None:
        prepared, settings = _prepared(floats, chosen)
    start = original
    if not is_quantized and prepared is not None and settings is not None:
        samples = datasets_of(chosen, original)[0].samples()
        some = samples[:: max(1, len(samples) // chosen.calibration)]
        start = _quantized(prepared, settings, some, chosen, show)
    hooks: list[Hook] = [Quantizers(start, prepared)]
    if not chosen.labels and floats is not None:
        hooks.append(_Teaching(load(floats), chosen.loss))
    if chosen.labels:
        chosen = dataclasses.replace(chosen, loss=chosen.loss or "cross-entropy")
    else:
        chosen = dataclasses.replace(chosen, metric=chosen.metric or "agreement")
    return train(
        "qat",
        model if floats is None else floats,
        chosen,
        start=start,
        hooks=hooks,
        share=1.0 if chosen.labels else 0.0,
        folder=folder,
        resume=resume,
        progress=progress,
    )


def _prepared(model: ModelLike, recipe: QatRecipe) -> tuple[ir.Model, Settings]:
    """A float model, folded and merged, of an opset that has the formats, and how it is to be quantized."""
    weight, target = find_format(recipe.weights), find_target(recipe.target)
    if not target.placement:
        raise UsageError(
            f"qat: target {target.name} has no integer kernels: take cpu, arm, tensorrt or generic"
        )
    target = dataclasses.replace(target, contrib=False)  # what is trained is of the standard
    scheme = Scheme("qat", "", static=True, weight=weight.name)
    activation = recipe.activations if recipe.activations not in ("", "none") else None
    how = {"per_channel": recipe.per_channel, "saturates": False}
    settings = settings_for(scheme, target, activation=activation, symmetric=False, method="auto", **how)
    assert settings is not None  # the scheme is static
    outcome = prepare(scheme, settings, target, freeze=True).run(opener(model))
    require_opset(outcome, settings)
    name_values_apart(outcome.model)
    return outcome.model, settings


def _quantized(
    model: ir.Model, settings: Settings, samples: Sequence[Feeds], recipe: QatRecipe, progress: Progress
) -> ir.Model:
    """The start: all that the target has integer kernels for, or the weights alone."""
    progress("quantizing", None)
    kept = kept_sites(model, recipe.keep)
    found: ir.Model | None
    few = find_format(recipe.weights).bits < 4
    if few and recipe.activations not in ("", "none"):
        raise UsageError(
            f"qat: ONNX Runtime makes integer kernels of {recipe.weights} weights and refuses them then: "
            "take --activations none"
        )
    if few or recipe.activations == "none":
        one = QuantizeWeights(type=recipe.weights, per_channel=recipe.per_channel, clip=True)
        veto = veto_of(dict.fromkeys(kept, "it is to stay in floating point"))
        made = Pipeline((one,)).run(opener(model), veto=veto)
        found = made.model if made.changes else None
    elif not len(samples):
        raise UsageError(
            "qat: a stream cannot be calibrated on: give a quantized model, or --activations none"
        )
    else:
        found = quantize_entirely(model, *split(samples), settings, kept, progress)
    if found is None:
        raise UsageError("qat: there is nothing in this model that could be quantized")
    return found


class _Teaching(Hook):
    """The loss of a run without labels: of each float output, against that of the float model."""

    def __init__(self, teacher: ir.Model, loss: str | Callable[..., Any]) -> None:
        self._teacher, self._module, self._loss = teacher, to_torch(teacher).requires_grad_(False), loss
        self._objective = Objective(())

    def start(self, trainer: Trainer) -> None:
        student, teacher = trainer.module, self._module.to(trainer.world.device).eval()
        assert isinstance(student, GraphModule)
        terms = []
        for output in self._teacher.graph.outputs:
            name = output.name or ""
            if output.dtype not in FLOATS or name not in student.output_names:
                continue
            logits = teacher.logits_of(name), student.logits_of(name)
            rank = len(output.shape) if output.shape is not None else 0
            usual = (
                "kl{temperature=4}"
                if rank == 2 or (logits[0] and logits[0].activation != "Sigmoid")
                else "mse"
            )
            for term in parse_loss(self._loss or usual).bound([name], [name], [name]).terms:
                through = all(logits) and term.loss.looks_through
                one, other = (each.name if through and each else name for each in logits)
                terms.append(dataclasses.replace(term, label=_OF_TEACHER + one, output=other))
        if not terms:
            raise UsageError("qat: the float model has no float output to learn from: give --labels")
        self._objective = Objective(tuple(terms))

    def loss(
        self, trainer: Trainer, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]
    ) -> Tensor | None:
        with torch.no_grad():
            given = self._module({name: arrays[name] for name in self._module.input_names})
        return self._objective(outputs, {_OF_TEACHER + name: one.float() for name, one in given.items()})
