"""Write a plan into a graph, as QuantizeLinear and DequantizeLinear around the nodes to be integer kernels.

A tensor that an integer kernel writes is read by all through its DequantizeLinear: the runtime fuses a
kernel only where nobody else reads its float output. Other tensors are quantized for those alone that
read integers, and stay as exact as they are for the rest.

HardSigmoid has no integer kernel, but clip(a x + b, 0, 1) is a times the sum of x and b / a, clipped to
[0, 1 / a], as the sum quantized over that range is: its integers are read back at a times their scale.
HardSwish is the product with that gate.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, float_attr
from onnxopt.quantization.formats import QuantParams, params_from_range, quantize
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.saturation import safe_params
from onnxopt.quantization.shield import exposed
from onnxopt.quantization.units import Unit
from onnxopt.quantization.weights import kernel_axis, quantize_weight
from onnxopt.scope import Names
from onnxopt.targets import Placement

__all__ = ["bias_of", "emit", "quantized_weight"]

_BIAS_ROOM = 2.0**30
"""The largest bias in units of its scale: half of int32, so that sums have room."""
_LEAST_SCALE = 2.0**-126
"""The smallest normal number of float32: the scale of a bias, which is a product of two."""


def emit(model: ir.Model, units: Sequence[Unit], plan: Plan, placement: Placement) -> dict[str, ir.Node]:
    """Quantize, in place, the units of `model` that the plan names; their nodes by site.

    Weights that other nodes read, too, stay beside their integers for those. The opset must have
    QuantizeLinear by axis, which is 13.
    """
    model.ir_version = max(model.ir_version, 4)  # before it, initializers were graph inputs
    writer = _Writer(model, plan, placement)
    chosen = [unit for unit in units if unit.site in plan.nodes]
    sites = {unit.site: unit.node for unit in chosen}
    read: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node, place in (one for unit in chosen for one in writer.readers(unit)):
        value = node.inputs[place]
        if value is not None and constant_of(value) is None:
            read.setdefault(value, []).append((node, place))
    written = {unit.output for unit in chosen if placement.outputs and unit.output.name in plan.tensors}
    for unit in chosen:
        writer.constants(unit)  # before activations, as graph outputs pass on their names
    for value in dict.fromkeys([*read, *(unit.output for unit in chosen if unit.output in written)]):
        writer.activation(value, read.get(value, ()), everyone=value in written)
    if placement.outputs:
        writer.shield(dict.fromkeys(sites.values()))
    model.graph.sort()
    return sites


def quantized_weight(unit: Unit, plan: Plan, source: QuantParams | None) -> tuple[np.ndarray, QuantParams]:
    """The integers of a unit's constant operand and their scale.

    Args:
        unit: has a constant operand.
        plan: how weights are quantized.
        source: of the activation that a layer multiplies them with; None where there is no bias to fit.

    A layer's scale of a channel is raised where its bias would not fit int32 otherwise. A channel that is
    all zeros has the scale that is best for its bias.
    """
    assert unit.weight is not None
    if unit.site in plan.rounded:
        return plan.rounded[unit.site]
    array = _array(unit, unit.weight)
    if not unit.is_layer or unit.weight == 0:
        return _as_activation(unit, array, plan)
    axis = kernel_axis(unit.node, unit.weight) if plan.per_channel else None
    ints, params = quantize_weight(array, plan.weight, axis=axis, power_of_two=plan.power_of_two)
    if plan.saturates:
        params = safe_params(unit.node, array, params)
        if plan.power_of_two:
            params = replace(params, scale=_raised(params.scale))
        ints = quantize(array, params).astype(ints.dtype)
    bias = bias_of(unit, plan)
    if bias is None or source is None:
        return ints, params
    fitted = replace(params, scale=_fitted(ints, params, bias, source, plan.power_of_two))
    if np.array_equal(fitted.scale, params.scale):
        return ints, params
    return quantize(array, fitted).astype(ints.dtype), fitted


def bias_of(unit: Unit, plan: Plan) -> np.ndarray | None:
    """The bias of a unit, as the plan corrects it; None where it has none."""
    tensor = constant_of(unit.bias) if unit.bias is not None else None
    return plan.biases.get(unit.site, None if tensor is None else tensor.numpy())


def _array(unit: Unit, place: int) -> np.ndarray:
    tensor = constant_of(unit.node.inputs[place])
    assert tensor is not None
    return tensor.numpy()


def _as_activation(unit: Unit, array: np.ndarray, plan: Plan) -> tuple[np.ndarray, QuantParams]:
    """A constant in the format of the activations that it meets, as a left factor has it, too."""
    form = plan.params[unit.sources[0].name or ""].format
    return quantize_weight(array, form, axis=None, symmetric=unit.is_layer, power_of_two=plan.power_of_two)


def _fitted(
    ints: np.ndarray, params: QuantParams, bias: np.ndarray, source: QuantParams, power_of_two: bool
) -> np.ndarray:
    """The scales of a weight, raised where a bias in units of their product with `source`'s needs it."""
    over = None if params.axis is None else tuple(i for i in range(ints.ndim) if i != params.axis)
    size = np.abs(bias.reshape(-1).astype(np.float64))
    size = size.max(initial=0) if over is None else size
    least = np.maximum(size / _BIAS_ROOM, _LEAST_SCALE) / float(source.scale)
    alone = ~ints.any(axis=over) & (size > 0)
    scale = np.where(alone, least, np.maximum(params.scale, least))
    return _raised(scale) if power_of_two else np.asarray(scale, np.float32)


def _raised(scale: np.ndarray) -> np.ndarray:
    """The next larger powers of two."""
    return np.asarray(2.0 ** np.ceil(np.log2(scale)), np.float32)


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

    def shield(self, chosen: Container[ir.Node]) -> None:
        """Keep the runtime from quantizing what is to stay in floating point."""
        wide: dict[ir.Value, ir.Value] = {}
        for reader, axes in exposed(self._graph, chosen, self._scales):
            value = _input(reader)
            if axes and value not in wide:
                wide[value] = self._by_channel(value, *axes[0])
            reader.replace_input_with(0, wide[value] if axes else self._copied(value, reader))

    def _copied(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        copy = self._node("Concat", [value], f"{value.name}_copy", [ir.AttrInt64("axis", 0)])
        self._graph.insert_before(reader, copy)
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        return copy.outputs[0]

    def _by_channel(self, value: ir.Value, axis: int, size: int) -> ir.Value:
        """What a DequantizeLinear gives, from one that has a scale for each index of an axis."""
        params, source, name = self._scales[value], value.producer(), value.name or ""
        assert source is not None
        scale, zero = np.full(size, params.scale), np.full(size, params.zero_point)
        inputs = [_input(source), *self._params(replace(params, scale=scale, zero_point=zero), name)]
        read = self._node("DequantizeLinear", inputs, f"{name}_by_channel", [ir.AttrInt64("axis", axis)])
        self._graph.append(read)
        read.outputs[0].type, read.outputs[0].shape = value.type, value.shape
        return read.outputs[0]

    def constants(self, unit: Unit) -> None:
        """Put integers in place of the unit's constant operands and its bias."""
        if unit.weight is None:
            return
        source = self._plan.params[unit.sources[0].name or ""]
        bias = bias_of(unit, self._plan)
        operands = {unit.weight: quantized_weight(unit, self._plan, source if self._placement.bias else None)}
        operands |= {place: _as_activation(unit, _array(unit, place), self._plan) for place in unit.others}
        node = unit.node
        for place, (ints, params) in operands.items():
            value = node.inputs[place]
            like = value.name if value is not None and value.name else "weight"
            node.replace_input_with(place, self._constant(node, ints, params, like))
        if bias is None:
            return
        name = unit.bias.name if unit.bias is not None and unit.bias.name else f"{unit.site}_bias"
        node.resize_inputs(3)
        if self._placement.bias:
            node.replace_input_with(2, self._bias(node, bias, operands[unit.weight][1], source, name))
        elif unit.site in self._plan.biases:
            node.replace_input_with(2, self._initializer(bias, name))

    def _bias(
        self, node: ir.Node, bias: np.ndarray, weight: QuantParams, source: QuantParams, like: str
    ) -> ir.Value:
        """A bias in int32, in units of the product of the scales."""
        scale = np.asarray(weight.scale.astype(np.float64) * float(source.scale), np.float32)
        limit = 2**31 - 1
        whole = np.rint(bias.reshape(-1).astype(np.float64) / scale).clip(-limit, limit)
        params = QuantParams(scale, np.zeros(scale.shape, np.int64), weight.format, 0 if scale.ndim else None)
        return self._constant(node, whole.astype(np.int32), params, like)

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


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
