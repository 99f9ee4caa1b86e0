"""Scales that are learned: each is its value at the start times e^p, and p is the parameter.

Learned step sizes are those of LSQ (Esser et al., arXiv 1902.08153; the gradient is that of `ops.quantize`).
Their logarithm stays positive, and a step of an optimizer is relative, whatever the tensor's range. Since
e^0 is 1, what is not trained is written as it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxopt.graph import constant_array, walk
from onnxopt.quantization.units import MOVES
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.state import constants

__all__ = ["LogScale", "activations_of", "learn_scales", "scale_groups"]


class LogScale(nn.Module):
    """start e^log, in the type of `start`."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.log = nn.Parameter(
            torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
        )
        self.log.role = "scales"  # type: ignore[attr-defined]  # what optimizers.role_of asks for
        self.start: Tensor

    @property
    def scale(self) -> Tensor:
        """The scale as it is now."""
        return (self.start * self.log.exp()).to(self.start.dtype)


def learn_scales(module: GraphModule, groups: Mapping[str, str]) -> dict[str, LogScale]:
    """Let the module learn scales, those of a group as one parameter: the first of each group -> its scale.

    groups: as of `scale_groups`, of the model that the module was made of.
    """
    held = module.tensors()
    learned = {first: LogScale(held[first]) for first in dict.fromkeys(groups.values()) if first in held}
    for name, first in groups.items():
        if first in learned:
            module.derive(name, learned[first], "scale")
    return learned


def scale_groups(model: ir.Model) -> dict[str, str]:
    """The constant scales of DequantizeLinear, and the one that each stays equal to: the first of its group.

    QuantizeLinear and its DequantizeLinear have one scale, whether or not one tensor holds it; so have both
    sides of an operator that only moves numbers, if they do at the start: the runtime then moves integers.
    Scales of int32 are products of others, see `write_back`.
    """
    names = {value: name for name, value in constants(model)}
    first: dict[ir.Value, ir.Value] = {}
    for node in walk(model.graph):
        data, scale = (*node.inputs, None, None)[:2]
        if node.op_type != "DequantizeLinear" or data is None or scale not in names or scale is None:
            continue
        quantizer = data.producer()
        if quantizer is not None and quantizer.op_type == "QuantizeLinear":
            own = quantizer.inputs[1]
            if own in names and own is not None and _equal(own, scale):
                first.setdefault(own, _moved(quantizer, first) or own)
                first.setdefault(scale, first[own])
        elif data in names and data.dtype != ir.DataType.INT32:
            first.setdefault(scale, scale)
    return {names[value]: names[one] for value, one in first.items()}


def activations_of(model: ir.Model, groups: Mapping[str, str]) -> dict[str, list[ir.Node]]:
    """The first scale of a group -> the QuantizeLinear nodes of computed tensors that have it."""
    names = {value: name for name, value in constants(model)}
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None or node.inputs[0] in names:
            continue
        first = groups.get(names.get(node.inputs[1], "")) if node.inputs[1] is not None else None
        if first is not None:
            found.setdefault(first, []).append(node)
    return found


def _moved(quantizer: ir.Node, first: Mapping[ir.Value, ir.Value]) -> ir.Value | None:
    """The scale of what is moved to this QuantizeLinear, if it has the same one."""
    data = quantizer.inputs[0]
    move = data.producer() if data is not None else None
    if move is None or move.op_type not in MOVES or move.inputs[0] is None:
        return None
    before = move.inputs[0].producer()
    if before is None or before.op_type != "DequantizeLinear" or before.inputs[1] not in first:
        return None
    same = all(
        _equal(one, other) for one, other in zip(before.inputs[1:], quantizer.inputs[1:], strict=False)
    )
    return first[before.inputs[1]] if same and before.inputs[1] is not None else None


def _equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    a, b = constant_array(one), constant_array(other)
    return a is not None and b is not None and np.array_equal(a, b)
