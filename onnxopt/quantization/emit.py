"""Write a plan into a graph, as QuantizeLinear and DequantizeLinear around the nodes to be integer kernels.

A tensor that an integer kernel writes is read by all through its DequantizeLinear: the runtime fuses a
kernel only where nobody else reads its float output. Other tensors are quantized for those alone that
read integers, and stay as exact as they are for the rest.

HardSigmoid has no integer kernel, but clip(a x + b, 0, 1) is a times the sum of x and b / a, clipped to
[0, 1 / a], as the sum quantized over that range is: its integers are read back at a times their scale.
HardSwish is the product with that gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, float_attr, sole_user
from onnxopt.quantization.formats import QuantParams, find_format, params_from_range, quantize
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.saturation import safe_params
from onnxopt.quantization.units import Unit
from onnxopt.quantization.weights import quantize_weight, weight_axis
from onnxopt.scope import Names
from onnxopt.targets import Placement

__all__ = ["bias_of", "emit", "quantized_weight"]

_REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")
"""Layers whose float weights ONNX Runtime may quantize by itself (WeightBiasQuantization)."""
_BIAS_ROOM = 2.0**30
"""The largest bias in units of its scale: half of int32, so that sums have room."""


def emit(model: ir.Model, units: Sequence[Unit], plan: Plan, placement: Placement) -> dict[str, ir.Node]:
    """Quantize, in place, the units of `model` that the plan names; their nodes by site.

    Weights that other nodes read, too, stay beside their integers for those. The opset must have
    QuantizeLinear by axis, which is 13.
    """
    writer = _Writer(model, plan, placement)
    chosen = [unit for unit in units if unit.site in plan.nodes]
    sites = {unit.site: unit.node for unit in chosen}
    read: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node, place in (one for unit in chosen for one in writer.readers(unit)):
        value = node.inputs[place]
        if value is not None and constant_of(value) is None:
            read.setdefault(value, []).append((node, place))
    written = {unit.output for unit in chosen if placement.outputs and unit.output.name in plan.tensors}
    for value in dict.fromkeys([*read, *(unit.output for unit in chosen if unit.output in written)]):
        writer.activation(value, read.get(value, ()), everyone=value in written)
    for unit in chosen:
        writer.constants(unit)
    if placement.outputs:
        writer.shield(model.graph, sites)
    model.graph.sort()
    return sites


def quantized_weight(unit: Unit, plan: Plan, source: QuantParams | None) -> tuple[np.ndarray, QuantParams]:
    """The integers of a unit's constant operand and their scale.

    Args:
        unit: has a constant operand.
        plan: how weights are quantized.
        source: of the activation that a layer multiplies them with; None where there is no bias to fit.

    A layer's scale of a channel is raised where its bias would not fit int32 otherwise.
    """
    assert unit.weight is not None
    if unit.site in plan.rounded:
        return plan.rounded[unit.site]
    tensor = constant_of(unit.node.inputs[unit.weight])
    assert tensor is not None
    array = tensor.numpy()
    if not unit.is_layer:
        return quantize_weight(array, find_format("uint8"), axis=None, symmetric=False)
    axis = weight_axis(unit.node, unit.weight) if plan.per_channel and array.ndim > 1 else None
    if unit.node.op_type == "MatMul" and array.ndim > 2:
        axis = None  # the runtime's kernel takes one scale for a stack of matrices
    ints, params = quantize_weight(array, plan.weight, axis=axis, power_of_two=plan.power_of_two)
    if plan.saturates:
        params = safe_params(unit.node, array, params)
        ints = quantize(array, params).astype(ints.dtype)
    bias = bias_of(unit, plan)
    if bias is None or source is None or axis is None:
        return ints, params
    needed = np.abs(bias.reshape(-1).astype(np.float64)) / (float(source.scale) * _BIAS_ROOM)
    if not (needed > params.scale).any():
        return ints, params
    params = replace(params, scale=np.maximum(params.scale, needed).astype(np.float32))
    return quantize(array, params).astype(ints.dtype), params


def bias_of(unit: Unit, plan: Plan) -> np.ndarray | None:
    """The bias of a unit, as the plan corrects it; None where it has none."""
    tensor = constant_of(unit.bias) if unit.bias is not None else None
    return plan.biases.get(unit.site, None if tensor is None else tensor.numpy())


def _ends_quantized(node: ir.Node) -> bool:
    """Whether all that reads a node, but for a Relu or Clip in between, is one QuantizeLinear."""
    user = sole_user(node.outputs[0])
    while user is not None and user.op_type in ("Relu", "Clip"):
        user = sole_user(user.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"


class _Writer:
    """Makes constants and nodes with fresh names."""

    def __init__(self, model: ir.Model, plan: Plan, placement: Placement) -> None:
        self._graph, self._plan, self._placement = model.graph, plan, placement
        self._names = Names(model)
        self._scales: dict[ir.Value, QuantParams] = {}
        self._slopes: dict[ir.Value, float] = {}

    def readers(self, unit: Unit) -> list[tuple[ir.Node, int]]:
        """Where a unit's operands are read, once its node is one that has an integer kernel."""
        node = unit.node
        if node.op_type not in ("HardSigmoid", "HardSwish"):
            return [(node, place) for place in unit.reads]
        swish, source = node.op_type == "HardSwish", node.inputs[0]
        assert source is not None
        slope = 1 / 6 if swish else float_attr(node, "alpha", 0.2)
        form = self._plan.params[source.name or ""].format
        shift = np.asarray(0.5 if swish else float_attr(node, "beta", 0.5), np.float32) / np.float32(slope)
        ints, params = quantize_weight(shift, form, axis=None, symmetric=False)
        operands = [source, self._constant(node, ints, params, f"{unit.site}_shift")]
        node.attributes.clear()
        if not swish:
            node.op_type = "Add"
            node.resize_inputs(2)
            node.replace_input_with(1, operands[1])
            self._slopes[unit.output] = slope
            return [(node, 0)]
        gate = self._node("Add", operands, f"{unit.site}_gate")
        self._graph.insert_before(node, gate)
        self._slopes[gate.outputs[0]] = slope
        read_back = self._pair(gate.outputs[0], params_from_range(0.0, 1.0, form))[1].outputs[0]
        node.op_type = "Mul"
        node.resize_inputs(2)
        node.replace_input_with(1, read_back)
        return [(gate, 0), (node, 0)]

    def activation(self, value: ir.Value, readers: Sequence[tuple[ir.Node, int]], *, everyone: bool) -> None:
        """Quantize a tensor and read it back, for its integer readers or for everyone."""
        params = self._plan.params[value.name or ""]
        quantized, result = self._pair(value, params)
        read_back = result.outputs[0]
        self._scales[read_back] = params
        if not everyone:
            for node, place in readers:
                node.replace_input_with(place, read_back)
            return
        name, shape = value.name, value.shape
        value.replace_all_uses_with(read_back, replace_graph_outputs=True)
        quantized.replace_input_with(0, value)
        if read_back.is_graph_output():
            value.name, read_back.name = self._names.fresh(f"{name}_float"), name
            value.shape = shape.copy() if shape is not None else None

    def _pair(self, value: ir.Value, params: QuantParams) -> tuple[ir.Node, ir.Node]:
        """A QuantizeLinear of a value and what reads it back; a gate is written as wide as its slope asks."""
        name, slope = value.name or "", self._slopes.get(value)
        read = self._params(params, name)
        wide = (
            read
            if slope is None
            else self._params(replace(params, scale=params.scale / np.float32(slope)), name)
        )
        quantized = self._node("QuantizeLinear", [value, *wide], f"{name}_quantized")
        result = self._node("DequantizeLinear", [quantized.outputs[0], *read], f"{name}_dequantized")
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), [quantized, result])
        else:
            self._graph.insert_after(producer, [quantized, result])
        result.outputs[0].type, result.outputs[0].shape = value.type, value.shape
        return quantized, result

    def shield(self, graph: ir.Graph, sites: Mapping[str, ir.Node]) -> None:
        """Keep the runtime from quantizing the weights of layers that stay in floating point.

        ONNX Runtime does so, with one scale for the whole weight, where such a layer stands between a
        DequantizeLinear of one scale and a QuantizeLinear. A scale for each channel, all equal, gives the
        same numbers, and it leaves the layer alone.
        """
        chosen = dict.fromkeys(sites.values())
        for node in [one for one in graph if one.op_type in _REQUANTIZED and one not in chosen]:
            value = node.inputs[0]
            params = self._scales.get(value) if value is not None else None
            if value is None or params is None or not _ends_quantized(node):
                continue
            channels = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
            if not isinstance(channels, int) or channels < 2:
                continue
            wide = replace(
                params,
                scale=np.full(channels, params.scale, np.float32),
                zero_point=np.full(channels, params.zero_point),
            )
            name = value.name or ""
            source = value.producer()
            assert source is not None
            inputs = [source.inputs[0], *self._params(wide, name)]
            read = self._node("DequantizeLinear", inputs, f"{name}_by_channel", [ir.AttrInt64("axis", 1)])
            graph.insert_before(node, read)
            read.outputs[0].type, read.outputs[0].shape = value.type, value.shape
            node.replace_input_with(0, read.outputs[0])

    def constants(self, unit: Unit) -> None:
        """Put integers in place of the unit's constant operand and bias."""
        if unit.weight is None:
            return
        node, weight = unit.node, unit.node.inputs[unit.weight]
        source = next((self._scales[v] for p in unit.reads if (v := node.inputs[p]) in self._scales), None)
        ints, params = quantized_weight(unit, self._plan, source if self._placement.bias else None)
        assert weight is not None
        node.replace_input_with(unit.weight, self._constant(node, ints, params, weight.name or "weight"))
        bias = bias_of(unit, self._plan)
        if bias is None or source is None:
            return
        name = unit.bias.name if unit.bias is not None and unit.bias.name else f"{unit.site}_bias"
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        if not self._placement.bias:
            node.replace_input_with(
                2, unit.bias if unit.site not in self._plan.biases else self._initializer(bias, name)
            )
            return
        scale = np.asarray(params.scale.astype(np.float64) * float(source.scale), np.float32)
        limit = 2**31 - 1
        whole = np.rint(bias.reshape(-1).astype(np.float64) / scale).clip(-limit, limit)
        fit = QuantParams(scale, np.zeros(scale.shape, np.int64), params.format, 0 if scale.ndim else None)
        node.replace_input_with(2, self._constant(node, whole.astype(np.int32), fit, name))

    def _constant(self, node: ir.Node, ints: np.ndarray, params: QuantParams, like: str) -> ir.Value:
        """Integers of a constant, read back in front of `node`."""
        stored = self._initializer(ints, f"{like}_quantized")
        inputs = [stored, self._initializer(params.scale, f"{like}_scale")]
        if params.zero_point.any() or ints.dtype != np.int32:
            inputs.append(self._initializer(params.zero_point.astype(ints.dtype), f"{like}_zero_point"))
        attributes = [] if params.axis is None else [ir.AttrInt64("axis", params.axis)]
        made = self._node("DequantizeLinear", inputs, f"{like}_dequantized", attributes)
        self._graph.insert_before(node, made)
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        made.outputs[0].shape = ir.Shape(ints.shape)
        return made.outputs[0]

    def _params(self, params: QuantParams, like: str) -> tuple[ir.Value, ir.Value]:
        zero = params.zero_point.astype(params.format.dtype.numpy())
        return self._initializer(params.scale, f"{like}_scale"), self._initializer(zero, f"{like}_zero_point")

    def _initializer(self, array: np.ndarray, like: str) -> ir.Value:
        tensor = ir.Tensor(np.asarray(array))
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=self._names.fresh(like), type=kind, shape=shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value], like: str, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Node:
        output = ir.Value(name=self._names.fresh(like))
        return ir.Node("", op_type, inputs, attributes, outputs=[output], name=output.name)
