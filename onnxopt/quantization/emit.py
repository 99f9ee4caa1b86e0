"""Write a plan into a graph, as QuantizeLinear and DequantizeLinear around the nodes to be integer kernels.

A tensor that an integer kernel writes is read by all through its DequantizeLinear: the runtime fuses a
kernel only where nobody else reads its float output. Other tensors are quantized for those alone that
read integers, and stay as exact as they are for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, sole_user
from onnxopt.quantization.formats import QuantParams, quantize
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
    for unit in chosen:
        for place in unit.reads:
            value = unit.node.inputs[place]
            if value is not None and constant_of(value) is None:
                read.setdefault(value, []).append((unit.node, place))
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
        form = plan.params[unit.output.name or ""].format
        return quantize_weight(array, form, axis=None, symmetric=False, power_of_two=plan.power_of_two)
    axis = weight_axis(unit.node, unit.weight) if plan.per_channel and array.ndim > 1 else None
    if unit.node.op_type == "MatMul" and array.ndim > 2:
        axis = None  # the runtime's kernel takes one scale for a stack of matrices
    ints, params = quantize_weight(array, plan.weight, axis=axis, power_of_two=plan.power_of_two)
    scale = safe_params(unit.node, array, params).scale if plan.saturates else params.scale
    bias = bias_of(unit, plan)
    if bias is not None and source is not None and axis is not None:
        needed = np.abs(bias.reshape(-1).astype(np.float64)) / (float(source.scale) * _BIAS_ROOM)
        scale = np.maximum(scale, needed)
    if not (scale > params.scale).any():
        return ints, params
    if plan.power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    params = replace(params, scale=scale.astype(np.float32))
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

    def activation(self, value: ir.Value, readers: Sequence[tuple[ir.Node, int]], *, everyone: bool) -> None:
        """Quantize a tensor and read it back, for its integer readers or for everyone."""
        params = self._plan.params[value.name or ""]
        scale, zero = self._params(params, value.name or "")
        quantized = self._node("QuantizeLinear", [value, scale, zero], f"{value.name}_quantized")
        result = self._node(
            "DequantizeLinear", [quantized.outputs[0], scale, zero], f"{value.name}_dequantized"
        )
        producer = value.producer()
        first = next(iter(self._graph))
        if producer is None:
            self._graph.insert_before(first, [quantized, result])
        else:
            self._graph.insert_after(producer, [quantized, result])
        read_back = result.outputs[0]
        read_back.type, read_back.shape = value.type, value.shape
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
