"""Quantization-aware training: a quantized graph is trained as it is, scales included, and stays that graph.

Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153. Without labels the float model is
the teacher (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx_ir as ir

from onnxopt.api.common import silent
from onnxopt.api.preparation import prepare, require_opset, settings_for
from onnxopt.calibration import exposable, split, spread
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import nodes
from onnxopt.index import operator_of
from onnxopt.job import Progress
from onnxopt.ledger import site_of
from onnxopt.model import ModelLike, clone, load, opener, reusable
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.quantize.dequantize import Dequantize
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.passes.shared.plain import PLAIN
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.branches import name_values_apart
from onnxopt.quantization.entire import quantize_entirely
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.keep import kept_sites, veto_of
from onnxopt.quantization.rounding import has_few_levels, round_in_turn
from onnxopt.quantization.saturation import find_saturation
from onnxopt.quantization.scaling import balance_weights
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Settings
from onnxopt.quantization.units import survey
from onnxopt.quantization.weights import weight_axis
from onnxopt.reporting.training import TrainingReport
from onnxopt.result import Result
from onnxopt.targets import find_target
from onnxopt.training.datasets import datasets_of
from onnxopt.training.distillation import train_taught
from onnxopt.training.interpreter.quantized import WITHIN
from onnxopt.training.kinds import QatRecipe
from onnxopt.training.quantizers import Quantizers
from onnxopt.training.recipe import read_recipe
from onnxopt.training.scales import untie_scales

__all__ = ["train_qat"]

_UNFUSED = (
    "quantized operators are written as floating-point ones between DequantizeLinear and QuantizeLinear, "
    "which the runtime fuses back"
)


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

    Without labels it learns to give what the float model gives; labels and a `teacher` are mixed, see `mix`.

    Args:
        model: in floating point, or with QuantizeLinear and DequantizeLinear, whoever wrote them.
        data, recipe, folder, resume, progress: as of `finetune`.
        options: the fields of `QatRecipe`.

    Returns:
        The best epoch's model; where training gained nothing over the start, that of a float model as it was
        quantized. The float model as it was, and `report.ok` false, where a quantized model gained nothing,
        or where more of the float model's metric is lost than `max_drop`.

    Raises:
        ModelError, UsageError: input that cannot be used, or an unknown option.
        DivergedError: the loss is no finite number any more.
    """
    given = {"data": data, **options} if data is not None else options
    chosen, show = read_recipe(QatRecipe, recipe, given), progress or silent
    model = reusable(model)
    original = load(model)
    fused = any(operator_of(node) in PLAIN for node in nodes(original))
    if fused:
        original = Pipeline((Dequantize(form="qdq"),)).run(opener(original)).model
    is_quantized = any(node.op_type == "DequantizeLinear" for node in nodes(original))
    taught = bool(chosen.labels or chosen.teachers)
    if is_quantized and not taught:
        raise UsageError("qat: without labels it learns from the float model: give that with --teacher")
    if is_quantized:
        untie_scales(original)
    floats = next(map(reusable, chosen.teachers), None) if is_quantized else model
    prepared, settings = (None, None) if floats is None else _prepared(floats, chosen)
    start = original
    if not is_quantized and prepared is not None and settings is not None:
        some = spread(datasets_of(chosen, original)[0].samples(), chosen.calibration)
        start = _quantized(prepared, settings, some, chosen, show)
        if not taught:  # by the model that the start was made of: hidden tensors are scaled alike
            chosen = dataclasses.replace(chosen, teacher=prepared)
    result = train_taught(
        "qat",
        model if floats is None else floats,
        chosen,
        start=start,
        serves=not is_quantized,
        hooks=[Quantizers(start, prepared)],
        folder=folder,
        resume=resume,
        progress=progress,
    )
    notes = [_UNFUSED] if fused and result.report.ok else []
    saturating = find_saturation(result.graph) if find_target(chosen.target).placement == "x86" else ()
    if saturating:
        said = f"on CPUs without VNNI, sums of {len(saturating)} layers can saturate"
        notes.append(f"{said}; --weights int7 avoids it")
    report = dataclasses.replace(result.report, notes=(*result.report.notes, *notes))
    return dataclasses.replace(result, report=report)


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
    """The start: all that the target has integer kernels for, or the weights alone.

    Where a weight is to have one scale, those of the float model are balanced first, in place.
    """
    progress("quantizing", None)
    if not recipe.per_channel:
        balance_weights(model, survey(model, settings.placement, frozenset(exposable(model))).units)
    kept = kept_sites(model, recipe.keep)
    found: ir.Model | None
    form = find_format(recipe.weights)
    activation = find_format(settings.activation or settings.placement.activation)
    few = form.bits < 4 or (form.is_float and not activation.is_float)
    if few and recipe.activations not in ("", "none"):
        raise UsageError(
            f"qat: ONNX Runtime makes integer kernels of {recipe.weights} weights and refuses them then: "
            "take --activations none"
        )
    if few or recipe.activations == "none":
        found = _weights_quantized(model, samples, recipe, kept, progress)
    elif not len(samples):
        raise UsageError(
            "qat: a stream cannot be calibrated on: give a quantized model, or --activations none"
        )
    else:
        found = quantize_entirely(model, *split(samples), settings, kept, progress)
    if found is None:
        raise UsageError("qat: there is nothing in this model that could be quantized")
    found = Pipeline((EliminateDead(),)).run(opener(found)).model  # the float weights
    for value in found.graph.initializers.values():
        if value.dtype == form.dtype:
            value.meta[WITHIN] = (int(form.low), int(form.high))
    return found


def _weights_quantized(
    model: ir.Model, samples: Sequence[Feeds], recipe: QatRecipe, kept: frozenset[str], progress: Progress
) -> ir.Model | None:
    """A copy with its weights alone quantized; None where nothing can be."""
    plain = QuantizeWeights(type=recipe.weights, per_channel=recipe.per_channel, clip=True)
    veto = veto_of(dict.fromkeys(kept, "it is to stay in floating point"))
    made, form = Pipeline((plain,)).run(opener(model), veto=veto), find_format(recipe.weights)
    if not made.changes or not len(samples) or not has_few_levels(form):
        return made.model if made.changes else None
    sites, whole = {rewrite.site for rewrite in made.granted}, clone(model)
    layers = [node for node in whole.graph if site_of(node) in sites]
    axis_of = partial(weight_axis, position=1) if recipe.per_channel else lambda _: None
    found = round_in_turn(whole, layers, samples, form, axis_of, progress)
    known = {node.inputs[1].name or "": one for node, one in found.items() if node.inputs[1] is not None}
    return Pipeline((dataclasses.replace(plain, known=known),)).run(opener(whole), veto=veto).model
