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

from onnxopt.graph import constant_array, constant_of, walk
from onnxopt.quantization.units import MOVES
from onnxopt.scope import Names
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.state import constants, is_constant_node

__all__ = ["LogScale", "activations_of", "learn_scales", "scale_groups", "untie_scales"]


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
                before = _moved(quantizer)
                source = before.inputs[1] if before is not None else None
                first.setdefault(own, first.get(source, own) if source is not None else own)
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


def untie_scales(model: ir.Model) -> None:
    """Give each quantized tensor a scale of its own, in place, where several read one constant.

    Tools that merge equal constants share scales that are equal before training. Those that have to stay so
    do, see `scale_groups`. Biases of int32 that are one number all over are drawn apart, too: each has the
    scale of its own layer.
    """
    names = Names(model)
    held = [node.outputs[0] for node in model.graph if is_constant_node(node)]
    held += model.graph.initializers.values()
    for value in sorted(held, key=lambda one: one.dtype != ir.DataType.INT32):  # biases before their scales
        tensor = constant_of(value)
        if tensor is None or value.is_graph_output() or len(value.uses()) < 2:
            continue
        numbers = constant_array(value) if value.dtype == ir.DataType.INT32 else None
        alike = numbers is not None and numbers.size > 0 and bool((numbers == numbers.flat[0]).all())
        groups: dict[ir.Node | ir.Value | None, list[tuple[ir.Node, int]]] = {}
        for node, place in tuple(value.uses()):
            quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            key = _origin(node) if quantizes and place == 1 else node if quantizes and alike else None
            groups.setdefault(key, []).append((node, place))
        for uses in list(groups.values())[1:]:
            name = names.fresh(value.name or "scale")
            same = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
            own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=same)
            model.graph.register_initializer(own)
            for node, place in uses:
                node.replace_input_with(place, own)


def _origin(node: ir.Node) -> ir.Value | None:
    """The tensor that a node quantizes or dequantizes, before it was quantized and moved by others."""
    while True:
        data = node.inputs[0]
        before = data.producer() if data is not None else None
        if node.op_type == "QuantizeLinear":
            before = _moved(node)
        if before is None or before.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return data
        node = before


def _moved(quantizer: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of what is moved to this QuantizeLinear, if it has the same scale and zero."""
    data = quantizer.inputs[0]
    move = data.producer() if data is not None else None
    if move is None or move.op_type not in MOVES or move.inputs[0] is None:
        return None
    before = move.inputs[0].producer()
    if before is None or before.op_type != "DequantizeLinear":
        return None
    same = all(
        _equal(one, other) for one, other in zip(before.inputs[1:], quantizer.inputs[1:], strict=False)
    )
    return before if same else None


def _equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    a, b = constant_array(one), constant_array(other)
    return a is not None and b is not None and np.array_equal(a, b)
