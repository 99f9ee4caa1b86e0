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

from onnxopt.errors import ModelError
from onnxopt.graph import constant_array, constant_of, walk
from onnxopt.passes.shared.quantized import carried
from onnxopt.quantization.units import MOVES
from onnxopt.scope import Names
from onnxopt.training.interpreter.module import GraphModule
from onnxopt.training.interpreter.quantized import called
from onnxopt.training.interpreter.state import constants, is_constant_node

__all__ = ["LogScale", "activations_of", "learn_scales", "scale_groups", "untie_scales"]


_PAIR = ("QuantizeLinear", "DequantizeLinear")


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

    Raises:
        ModelError: a scale is not finite, or not more than 0.
    """
    names = {value: name for name, value in constants(model)}
    found, heads = dict[ir.Value, ir.Value](), dict[ir.Node, ir.Value]()
    for node, tied in _tied(model).items():
        data, scale = node.inputs[0], node.inputs[1]
        if data is None or scale is None or scale not in names or data.dtype == ir.DataType.INT32:
            continue
        _require_positive(scale, node)
        if node.op_type != "DequantizeLinear":
            continue
        quantizer, members = data.producer(), [scale]
        if quantizer is not None and quantizer.op_type == "QuantizeLinear":
            own = quantizer.inputs[1]
            if own is None or own not in names or not _equal(own, scale):
                continue
            members = [own, scale]
        elif data not in names:
            continue
        known = next((found[one] for one in members if one in found), members[0])
        for one in members:
            found.setdefault(one, heads.setdefault(tied, known))
    return {names[value]: names[one] for value, one in found.items()}


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
    """Give quantized tensors scales of their own, in place, where several read one constant.

    Tools that merge equal constants share scales that are equal before training. Those that have to be equal,
    see `scale_groups`, still share. Biases of int32 that are one number all over are drawn apart, too: each
    has the scale of its own layer.
    """
    names = Names(model)
    held = [node.outputs[0] for node in model.graph if is_constant_node(node)]
    held += model.graph.initializers.values()
    for value in held:
        numbers = constant_array(value) if value.dtype == ir.DataType.INT32 else None
        if numbers is not None and numbers.size and (numbers == numbers.flat[0]).all():
            _draw_apart(model, names, value, {use.node: use.node for use in value.uses()}, 0)
    tied = _tied(model)
    for value in held:
        _draw_apart(model, names, value, tied, 1)


def _draw_apart(
    model: ir.Model, names: Names, value: ir.Value, keys: Mapping[ir.Node, ir.Node], place: int
) -> None:
    """Let DequantizeLinear and QuantizeLinear of different keys, which read a constant there, read copies."""
    tensor = constant_of(value)
    if tensor is None or value.is_graph_output():
        return
    groups: dict[ir.Node | None, list[tuple[ir.Node, int]]] = {}
    for node, position in tuple(value.uses()):
        key = keys.get(node) if position == place and node.op_type in _PAIR else None
        groups.setdefault(key, []).append((node, position))
    for uses in list(groups.values())[1:]:
        name = names.fresh(value.name or "scale")
        same = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=same)
        model.graph.register_initializer(own)
        for node, position in uses:
            node.replace_input_with(position, own)


def _tied(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """QuantizeLinear and DequantizeLinear, each with one of those whose scale has to be that of its own."""
    found: dict[ir.Node, ir.Node] = {}
    readers: dict[tuple[ir.Value | None, ir.Value | None], ir.Node] = {}

    def head(node: ir.Node) -> ir.Node:
        while found[node] is not node:
            node = found[node]
        return node

    for node in walk(model.graph):
        if node.op_type in _PAIR:
            others = (*_before(node), readers.setdefault((node.inputs[0], node.inputs[1]), node))
            heads = [head(one) for one in others if one in found]
            found[node] = heads[0] if heads else node
            found.update(dict.fromkeys(heads, found[node]))
    return {node: head(node) for node in found}


def _before(node: ir.Node) -> list[ir.Node]:
    """The QuantizeLinear in front of DequantizeLinear, or the DequantizeLinear of what is moved in front of a
    QuantizeLinear, where they have the same scale (and zero point)."""
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    if made is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [made] if made.op_type == "QuantizeLinear" and _equal(made.inputs[1], node.inputs[1]) else []
    places, _ = carried(made) or ([0] if made.op_type in MOVES else [], [])
    sources = [value.producer() for place in places if (value := made.inputs[place]) is not None]
    found = [one for one in sources if one is not None and one.op_type == "DequantizeLinear"]
    same = (map(_equal, one.inputs[1:], node.inputs[1:]) for one in found)
    return found if len(found) == len(places) and all(map(all, same)) else []


def _require_positive(scale: ir.Value, node: ir.Node) -> None:
    array = constant_array(scale)
    assert array is not None
    bad = array[~(np.isfinite(array) & (array > 0))]
    if bad.size:
        raise ModelError(
            f"qat: {called(node)}: the scale {scale.name!r} is {bad[0]:g}; expected finite numbers above 0"
        )


def _equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    a, b = constant_array(one), constant_array(other)
    return a is not None and b is not None and np.array_equal(a, b)
