"""Quantization-aware training: a quantized graph is trained as it is, scales included, and stays that graph.

Source: Esser et al., "Learned Step Size Quantization", 2020; a label-free run distils the float original.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.api.common import silent
from onnxopt.api.preparation import prepare, require_opset, settings_for
from onnxopt.calibration import split
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import nodes
from onnxopt.job import Progress
from onnxopt.model import ModelLike, load, opener, reusable
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.pipeline import Outcome
from onnxopt.quantization.branches import name_values_apart
from onnxopt.quantization.entire import quantize_entirely
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.keep import kept_sites, veto_of
from onnxopt.quantization.schemes import Scheme
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.targets import PLACEMENTS, find_target
from onnxopt.training.dataset import parse_sizes
from onnxopt.training.hooks import Hook
from onnxopt.training.losses import Objective, parse_loss
from onnxopt.training.module import GraphModule, to_torch
from onnxopt.training.ops.quantize import limits
from onnxopt.training.quantized import integers_of, reading
from onnxopt.training.recipe import QatRecipe, read_recipe
from onnxopt.training.scales import LogScale, activations_of, learn_scales, scale_groups
from onnxopt.training.schedules import parse_schedule
from onnxopt.training.state import constants
from onnxopt.training.values import FLOATS, tensor_of
from onnxopt.training.work import datasets_of, train

if TYPE_CHECKING:
    from onnxopt.training.loop import Trainer

__all__ = ["qat"]

_MOMENTUM = 0.9
"""Of the moving averages of what activations reach."""
_ALIKE = 0.9
"""The share of its integers that a float weight gives, at least, that is taken for what they were made of."""


def qat(
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

        qat("m.onnx", "train.npz", labels="y", weights="int4", epochs=5)

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
        raise UsageError(
            "qat: without labels it learns from the float model: give that with --teacher, or --labels"
        )
    prepared = _prepared(floats, chosen) if floats is not None else None
    start = original
    if not is_quantized and prepared is not None:
        samples = datasets_of(chosen, original)[0].samples()
        start = _quantized(prepared, samples[:: max(1, len(samples) // chosen.calibration)], chosen, show)
    hooks: list[Hook] = [_Quantizers(start, prepared.model if prepared is not None else None)]
    if not chosen.labels:
        hooks.append(_Teaching(load(floats), chosen.loss))  # type: ignore[arg-type]  # checked above
        chosen = dataclasses.replace(chosen, metric=chosen.metric or "agreement")
    return train(
        "qat",
        model if floats is None else floats,
        chosen,
        start=start,
        hooks=hooks,
        labelled=bool(chosen.labels),
        folder=folder,
        resume=resume,
        progress=progress,
    )


def _prepared(model: ModelLike, recipe: QatRecipe) -> Outcome:
    """A float model, folded and merged, of an opset that has the formats, with weights quantized if alone."""
    weight, target = find_format(recipe.weights), dataclasses.replace(find_target(recipe.target), contrib=False)
    if not target.placement:
        raise UsageError(f"qat: target {target.name} has no integer kernels: take one of cpu, arm, tensorrt")
    scheme = Scheme("qat", "", static=True, weight=weight.name, opset=max(17, weight.opset))
    found = settings_for(scheme, target, activation=None, symmetric=False, method="auto", saturates=False)
    outcome = prepare(scheme, found, target, freeze=True).run(opener(model))
    require_opset(outcome, found)  # type: ignore[arg-type]  # a static scheme has settings
    name_values_apart(outcome.model)
    return outcome


def _quantized(outcome: Outcome, samples: Sequence[Feeds], recipe: QatRecipe, progress: Progress) -> ir.Model:
    """The start: all that the target has integer kernels for, or the weights alone."""
    progress("quantizing", None)
    kept = kept_sites(outcome.model, recipe.keep)
    if recipe.activations == "none":
        one = QuantizeWeights(type=recipe.weights, per_channel=recipe.per_channel, clip=True)
        veto = veto_of(dict.fromkeys(kept, "it is to stay in floating point"))
        made = dataclasses.replace(_EMPTY, passes=(one,)).run(opener(outcome.model), veto=veto)
        found = made.model if made.changes else None
    else:
        found = quantize_entirely(outcome.model, *split(samples), _settings(recipe), kept, progress)
    if found is None:
        raise UsageError("qat: there is nothing that could be quantized in this model")
    return found


class _Quantizers(Hook):
    """Learned scales, and weights that begin as the floats that their integers were made of."""

    def __init__(self, model: ir.Model, floats: ir.Model | None) -> None:
        self._model, self._floats = model, floats
        self._fixed: dict[str, Tensor] | None = None
        self.scales: dict[str, LogScale] = {}

    def start(self, trainer: Trainer) -> None:
        module, recipe = trainer.module, trainer.recipe
        assert isinstance(module, GraphModule)
        assert isinstance(recipe, QatRecipe)
        groups = scale_groups(self._model)
        self.scales = learn_scales(module, groups)
        if not self.scales:
            raise UsageError("qat: the model has no DequantizeLinear with a constant scale")
        module.to(trainer.world.device)
        if self._floats is not None:
            _adopt(module, self._model, self._floats)
        if recipe.observe:
            self._observe(trainer, groups, recipe.observe)

    def epoch(self, trainer: Trainer, epoch: int) -> None:
        assert isinstance(trainer.recipe, QatRecipe)
        if trainer.recipe.scale_epochs and epoch >= trainer.recipe.scale_epochs:
            self._fixed = {name: one.log.detach().clone() for name, one in self.scales.items()}

    def stepped(self, trainer: Trainer) -> None:
        for name, fixed in (self._fixed or {}).items():
            self.scales[name].log.copy_(fixed)

    def _observe(self, trainer: Trainer, groups: Mapping[str, str], batches: int) -> None:
        """Set the scales of activations by moving averages of the least and the most that they reach."""
        watched = {
            name: found
            for name, found in activations_of(self._model, groups).items()
            if name in self.scales and self.scales[name].start.numel() == 1
        }
        module = to_torch(self._model).to(trainer.world.device).requires_grad_(False)
        module.expose(*(_source(node) for found in watched.values() for node in found))
        sizes = parse_sizes(trainer.recipe.batch_size, parse_schedule("constant"), trainer.recipe.seed)
        ranges: dict[str, Tensor] = {}
        for number, (_, pieces) in enumerate(trainer.data.batches(sizes, 0, 1)):
            if number == batches:
                break
            outputs = module({name: pieces[0].arrays[name] for name in module.input_names})
            for name, found in watched.items():
                ends = [torch.stack(outputs[_source(node)].aminmax()).float() for node in found]
                new = torch.stack(ends)
                now = torch.stack([new[:, 0].min(), new[:, 1].max()])
                ranges[name] = _MOMENTUM * ranges[name] + (1 - _MOMENTUM) * now if name in ranges else now
        for name, (low, high) in ranges.items():
            self.scales[name].start.fill_(_covering(watched[name][0], float(low), float(high)))


def _source(node: ir.Node) -> str:
    value = node.inputs[0]
    return (value.name if value is not None else None) or ""


def _covering(quantizer: ir.Node, low: float, high: float) -> float:
    """The scale with which integers reach from low to high, the zero point being as it is."""
    value = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    dtype = quantizer.outputs[0].dtype or ir.DataType.UINT8
    tensor = value.const_value if value is not None else None
    zero = float(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0.0
    least, most = limits(dtype)
    return max(
        high / (most - zero) if most > zero else 0.0,
        low / (least - zero) if least < zero else 0.0,
        2.0**-100,
    )


def _adopt(module: GraphModule, model: ir.Model, floats: ir.Model) -> None:
    """Let weights that the model has as integers begin as the float model's, where those give the integers."""
    known: dict[tuple[int, ...], list[Tensor]] = {}
    for _, value in constants(floats):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS:
            found = tensor_of(tensor.numpy(), tensor.dtype)
            known.setdefault(tuple(found.shape), []).append(found)
    held = module.tensors()
    for name, value in constants(model):
        one, tensor = reading(value), value.const_value
        if one is None or tensor is None or name not in held or tensor.dtype == ir.DataType.INT32:
            continue
        stored = tensor_of(tensor.numpy(), tensor.dtype)
        shares = [
            (float((integers_of(each, tensor.dtype, one, one.scale()) == stored).float().mean()), each)
            for each in known.get(tuple(stored.shape), ())
        ]
        share, best = max(shares, key=lambda pair: pair[0], default=(0.0, stored))
        if share >= _ALIKE and held[name].is_floating_point():
            held[name].copy_(best)


class _Teaching(Hook):
    """The loss of a run without labels: of the float outputs, against those of the float model."""

    def __init__(self, teacher: ir.Model, loss: Any) -> None:
        self._module, self._loss = to_torch(teacher).requires_grad_(False), loss
        self._pairs: list[tuple[Objective, str]] = []

    def start(self, trainer: Trainer) -> None:
        student, teacher = trainer.module, self._module.to(trainer.world.device).eval()
        assert isinstance(student, GraphModule)
        for name, dtype in teacher.float_outputs():
            pass
