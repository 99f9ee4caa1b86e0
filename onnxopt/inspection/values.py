"""Shape arithmetic done: what Shape, Gather, Concat and their like compute, where shapes already say it.

onnx's own data propagation stops at many ops that exporters write (Pad amounts, Where, Mod, Resize sizes).
Here the nodes of a scratch model whose inputs are small and known are run once by onnx's reference
implementation and become Constants, and shapes are inferred again for the nodes they reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxopt.graph import constant_array, constant_of, int_attr, is_deterministic, static_shape, subgraphs_of

__all__ = ["LARGEST", "settle_values"]

LARGEST = 1024
"""Elements: shape arithmetic works on tensors far smaller than this; anything larger is data."""

_LARGEST_FLOAT = 8
"""Elements: floating-point shape arithmetic has scalars (paddings) and a number per dimension (scales)."""

_MOVES = frozenset({"Concat", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze"})
"""Ops that only move elements, so that they also work on a shape of which a part is symbolic."""


def settle_values(model: ir.Model) -> bool:
    """Turn what follows from known shapes into Constants, in place, and say whether there was anything."""
    return _Settler(model).settle(model.graph)


class _Settler:
    def __init__(self, model: ir.Model) -> None:
        self._opsets = model.opset_imports
        self._ir_version = model.ir_version
        self._partial: dict[ir.Value, np.ndarray] = {}
        self._changed: set[ir.Value] = set()

    def settle(self, graph: ir.Graph) -> bool:
        found = False
        for node in graph:
            for body in subgraphs_of(node):
                found |= self.settle(body)
            if node.op_type == "Reshape" and node.inputs[1] in self._partial:
                self._update(node.outputs[0], _reshaped(node.inputs[0], self._partial[node.inputs[1]]))
            elif not self._changed.isdisjoint(node.inputs):
                self._infer(node)
            array = self._evaluate(node)
            if array is None:
                continue
            if array.dtype == object:
                self._partial[node.outputs[0]] = array
                continue
            _become_constant(node, array)
            self._changed.add(node.outputs[0])
            found = True
        return found

    def _evaluate(self, node: ir.Node) -> np.ndarray | None:
        """The node's value: concrete, or an object array that also holds symbols; None where unknown."""
        if node.domain or node.op_type == "Constant" or len(node.outputs) != 1:
            return None
        if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].shape is not None:
            dims = node.inputs[0].shape.dims
            return _array(dims[int_attr(node, "start", 0) : int_attr(node, "end", len(dims))])
        inputs = [None if value is None else self._known(value) for value in node.inputs]
        if any(array is None and value is not None for array, value in zip(inputs, node.inputs, strict=True)):
            return None
        mixed = any(array is not None and array.dtype == object for array in inputs)
        if not inputs or (mixed and node.op_type not in _MOVES) or not is_deterministic(node):
            return None
        size = static_shape(node.outputs[0])
        dtype = node.outputs[0].dtype
        limit = _LARGEST_FLOAT if dtype is not None and dtype.is_floating_point() else LARGEST
        if size is None or math.prod(size) > limit or any(True for _ in subgraphs_of(node)):
            return None
        if mixed and node.op_type == "Gather" and inputs[0] is not None and inputs[1] is not None:
            return _array(np.take(inputs[0], inputs[1], axis=int_attr(node, "axis", 0)))
        return self._run(node, inputs)

    def _known(self, value: ir.Value) -> np.ndarray | None:
        array = self._partial.get(value)
        return array if array is not None else _small_constant(value)

    def _run(self, node: ir.Node, inputs: Sequence[np.ndarray | None]) -> np.ndarray | None:
        feeds = {v.name or "": array for v, array in zip(node.inputs, inputs, strict=True) if v is not None}
        graph = onnx.GraphProto(
            node=[ir.to_proto(node)],
            input=[onnx.ValueInfoProto(name=name) for name in feeds],
            output=[onnx.ValueInfoProto(name=node.outputs[0].name)],
        )
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(graph, opsets=dict(self._opsets)).run(None, feeds)
        except Exception:  # the reference refuses in many ways; its refusal only leaves the value unknown
            return None
        if not isinstance(results, Sequence) or not isinstance(results[0], np.ndarray | np.generic):
            return None
        array = np.asarray(results[0])
        return _array(array) if array.dtype == object else array

    def _infer(self, node: ir.Node) -> None:
        """Infer the outputs' shapes from what is known of the inputs by now."""
        version = self._opsets.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, version, node.domain):
            return
        present = [value for value in node.inputs if value is not None]
        if any(value.type is None for value in present):
            return
        types = {value.name or "": ir.serde.serialize_value(value).type for value in present}
        data = {}
        for value in present:
            array = _small_constant(value)
            if array is not None:
                data[value.name or ""] = ir.serde.serialize_tensor(ir.tensor(array, name=value.name))
        try:
            inferred = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, version, node.domain),
                ir.to_proto(node),
                types,
                data,
                opset_imports=[onnx.OperatorSetIdProto(domain=d, version=v) for d, v in self._opsets.items()],
                ir_version=self._ir_version,
            )
        except (
            onnx.shape_inference.InferenceError,
            RuntimeError,
        ):  # the shapes stay as little known as before
            return
        for value in node.outputs:
            kind = inferred.get(value.name or "")
            self._update(value, None if kind is None else ir.serde.deserialize_type_proto_for_shape(kind))

    def _update(self, value: ir.Value, shape: ir.Shape | None) -> None:
        if shape is not None and shape != value.shape:
            value.shape = shape
            self._changed.add(value)


def _reshaped(value: ir.Value | None, target: np.ndarray) -> ir.Shape | None:
    """The shape that a partly symbolic target gives; its -1 is found where the symbols cancel."""
    if value is None or value.shape is None or any(dim == 0 for dim in target):
        return None
    dims = list(target)
    if -1 in dims:
        symbols = Counter(str(dim) for dim in value.shape if not isinstance(dim, int))
        size = math.prod(dim for dim in value.shape if isinstance(dim, int))
        rest = math.prod(dim for dim in dims if isinstance(dim, int) and dim != -1)
        cancels = symbols == Counter(str(dim) for dim in dims if not isinstance(dim, int))
        if not cancels or value.shape.has_unknown_dim() or not rest or size % rest:
            return None
        dims[dims.index(-1)] = size // rest
    return ir.Shape(dims)


def _small_constant(value: ir.Value) -> np.ndarray | None:
    tensor = constant_of(value)
    return None if tensor is None or tensor.size > LARGEST else constant_array(value)


def _array(dims: object) -> np.ndarray:
    array = np.array(dims, dtype=object)
    return array.astype(np.int64) if all(isinstance(dim, int) for dim in array.flat) else array


def _become_constant(node: ir.Node, array: np.ndarray) -> None:
    node.resize_inputs(0)
    node.op_type = "Constant"
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    node.outputs[0].shape = ir.Shape(array.shape)
