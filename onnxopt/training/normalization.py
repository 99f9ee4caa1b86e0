"""BatchNormalization in training: put in after each Conv and folded back at the end, or measured anew.

A folded Conv keeps its weights under their own names, which `fold-batchnorm`, made for any graph, does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from onnxopt.calibration.exposing import cut
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, constant_of, float_attr, nodes, set_constant
from onnxopt.model import clone
from onnxopt.runtimes import open_session
from onnxopt.scope import Names
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.statistics import Follows
from onnxopt.training.loop.batching import tensors_of
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.recipe import Recipe

__all__ = ["Estimate", "fold_batchnorm", "follows", "with_batchnorm"]

_EPSILON = 1e-5
_PARTS = ("scale", "bias", "mean", "var")
_MEASURED = 4096
"""Samples of an epoch that statistics are measured on, at most."""


class Estimate(Hook):
    """Measures all statistics anew before each evaluation, with the weights that are judged.

    They are the means over batches of the epoch, in float32 where training is in less. Source: Wu & Johnson,
    "Rethinking 'Batch' in BatchNorm", 2021 (2105.07576), section 3.
    """

    whole = False

    def evaluated(self, trainer: Trainer) -> None:
        module, seen = trainer.module.train(), 0
        assert isinstance(module, GraphModule)
        module.batches.measured = {}
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, contextlib.closing(trainer.batches()) as batches:
            for size, pieces in batches:
                module.batches.size, seen = size / len(pieces), seen + size
                for piece in pieces:
                    trainer.forward(tensors_of(piece, module, trainer.world.device))
                if seen >= _MEASURED:
                    break
        module.batches.measured = None
        module.eval()


def follows(recipe: Recipe, model: ir.Model, processes: int) -> Follows:
    """Whether the BatchNormalization nodes of a model go by the batch in a training.

    Raises:
        UsageError: there are none, or they would never follow.
    """
    found = [node for node in nodes(model) if node.op_type == "BatchNormalization"]
    mode = {"auto": "batch" if recipe.batchnorm else "frozen"}.get(recipe.statistics, recipe.statistics)
    if mode == "frozen":
        return False
    if recipe.statistics == mode and not found:
        why = "what is trained has no BatchNormalization (qat and onnxopt prune --channels fold it)"
        raise UsageError(f"statistics={mode}: {why}")
    if mode == "batch" and any(float_attr(node, "momentum", 0.9) == 1 for node in found):
        raise UsageError("statistics=batch: with the momentum 1 of a node they would stay: take estimate")
    return "union" if processes > 1 else True


def with_batchnorm(model: ir.Model, samples: Sequence[Feeds]) -> tuple[ir.Model, tuple[str, ...]]:
    """A copy with a BatchNormalization after each Conv that has none; the names of what they give.

    Mean and variance are those of the samples; scale and bias undo them, so that the model computes what it
    did before. A Conv of the main graph counts if its weights are its own initializers and its output no
    graph output.

    Raises:
        UsageError: there are no samples.
    """
    model = clone(model)
    graph, names = model.graph, Names(model)
    convs = [node for node in graph if _lacks(node)]
    if convs and not len(samples):
        raise UsageError("batchnorm: statistics are taken from samples by number, which a stream has not")
    sites = tuple(node.outputs[0].name or "" for node in convs)
    moments = _moments(model, sites, samples) if sites else []
    for node, site, (mean, variance) in zip(convs, sites, moments, strict=True):
        value = node.outputs[0]
        result = ir.Value(name=site, type=value.type, shape=value.shape)
        value.replace_all_uses_with(result)
        arrays = (np.sqrt(variance + _EPSILON), mean, mean, variance)
        parts = [
            _add(graph, names.fresh(f"{site}_bn_{part}"), array)
            for part, array in zip(_PARTS, arrays, strict=True)
        ]
        norm = ir.Node(
            "",
            "BatchNormalization",
            [value, *parts],
            [ir.AttrFloat32("epsilon", _EPSILON)],
            outputs=[result],
            name=names.fresh(f"{site}_bn"),
        )
        value.name = names.fresh(f"{site}_before_bn")
        graph.insert_after(node, norm)
    return model, sites


def fold_batchnorm(model: ir.Model, sites: Sequence[str]) -> None:
    """Let each Conv do what the BatchNormalization that gives one of `sites` does, and remove that.

    w' = w s, b' = (b - mean) s + bias, where s = scale / sqrt(variance + epsilon).
    """
    graph = model.graph
    norms = {value.name or "": node for node in graph for value in node.outputs}
    for site in sites:
        norm = norms[site]
        inner = norm.inputs[0]
        conv = inner.producer() if inner is not None else None
        assert inner is not None
        assert conv is not None
        scale, bias, mean, variance = (_array(part) for part in norm.inputs[1:5])
        factor = scale / np.sqrt(variance + _EPSILON)
        kernel = conv.inputs[1]
        assert kernel is not None
        weight = _array(kernel)
        set_constant(kernel, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
        old = conv.inputs[2] if len(conv.inputs) > 2 else None
        shift = (-mean if old is None else _array(old) - mean) * factor + bias
        if old is None:
            own = _add(graph, Names(model).fresh(f"{site}_bias"), shift)
            conv.resize_inputs(3)
            conv.replace_input_with(2, own)
        else:
            set_constant(old, shift)
        parts = [part for part in norm.inputs[1:] if part is not None]
        norm.outputs[0].replace_all_uses_with(inner)
        graph.remove(norm, safe=True)
        inner.name = site
        for part in parts:
            del graph.initializers[part.name or ""]


def _lacks(node: ir.Node) -> bool:
    """Whether it is a Conv without a BatchNormalization, where one can be put."""
    if node.op_type != "Conv" or node.domain or node.outputs[0].is_graph_output():
        return False
    weights = [one for one in node.inputs[1:] if one is not None]
    own = all(
        one.is_initializer() and constant_of(one) is not None and len(one.uses()) == 1 for one in weights
    )
    floats = weights[0].dtype == ir.DataType.FLOAT
    return own and floats and all(use.node.op_type != "BatchNormalization" for use in node.outputs[0].uses())


def _moments(
    model: ir.Model, names: Sequence[str], samples: Sequence[Feeds]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance by channel (axis 1) of tensors."""
    sums: dict[str, list[np.ndarray]] = {}
    with open_session(cut(clone(model), names), level="none") as session:
        for feeds in samples:
            for name, array in session.run(feeds).items():
                rows = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).astype(np.float64)
                new = [np.full(len(rows), rows.shape[1]), rows.sum(1), (rows**2).sum(1)]
                sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
    means = [(sums[name][1] / sums[name][0], sums[name][2] / sums[name][0]) for name in names]
    return [(mean, np.maximum(square - mean**2, 0)) for mean, square in means]


def _array(value: ir.Value | None) -> np.ndarray:
    array = constant_array(value)
    assert array is not None
    return array.astype(np.float64)


def _add(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of floats."""
    tensor = ir.tensor(array.astype(np.float32), name=name)
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
    value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
