"""What a node gives for known inputs.

A table of kernels serves the common operators in every opset; the others go to ONNX's reference evaluator,
as far as it implements what the operator meant in the model's opset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxopt.evaluation.arrangement import ARRANGEMENT
from onnxopt.evaluation.call import Call, CannotEvaluateError, Kernel, Result
from onnxopt.evaluation.elementwise import ELEMENTWISE
from onnxopt.evaluation.reduction import REDUCTION

__all__ = ["KERNELS", "MOVES", "check", "evaluate"]

KERNELS: dict[str, Kernel] = {**ARRANGEMENT, **ELEMENTWISE, **REDUCTION}
"""Operator of the default domain -> its kernel."""

MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose kernels also take arrays of Python objects."""

_UNSURE = frozenset({"AveragePool", "ConvTranspose", "DeformConv", "LpPool", "MaxPool", "MaxUnpool"})
"""Operators that the reference evaluator gets wrong, for some attributes: groups, pads, auto_pad."""

_REFERENCE_LIMIT = 1 << 16
"""Elements that the reference evaluator, which loops in Python, is given to work on."""


def evaluate(
    node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int, limit: int = 1 << 24
) -> tuple[np.ndarray, ...]:
    """The outputs of a deterministic node of the default domain, one array for each.

    Args:
        node: without subgraphs and reference attributes.
        inputs: one array for each input, None where it is left out. They are not changed; outputs may be
            views of them.
        opset: version of the default domain.
        limit: bytes that one output may take where it can be larger than the inputs.

    Raises:
        CannotEvaluateError: with the reason.
    """
    kernel = KERNELS.get(node.op_type)
    try:
        with np.errstate(all="ignore"):
            result = kernel(Call(node, inputs, opset, limit)) if kernel else _reference(node, inputs, opset)
    except CannotEvaluateError:
        raise
    except Exception as error:
        raise CannotEvaluateError.at(node, error) from error
    arrays = result if isinstance(result, tuple) else (result,)
    for value, array in zip(node.outputs, arrays, strict=False):
        if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind in "SU":
            raise CannotEvaluateError("it gives no plain tensor")
        if array.dtype != object:
            check(value, ir.DataType.from_numpy(array.dtype), array.shape)
    return tuple(map(np.asarray, arrays))


def _reference(node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> Result:
    if node.op_type in _UNSURE:
        raise CannotEvaluateError(f"{node.op_type} is left to the runtime")
    if not onnx.defs.has(node.op_type, opset):
        raise CannotEvaluateError(f"{node.op_type} is no operator of opset {opset}")
    schema = onnx.defs.get_schema(node.op_type, opset)
    if not all(kind.startswith("tensor") for put in schema.outputs for kind in put.types):
        raise CannotEvaluateError("it gives no plain tensor")
    if _meaning(schema) != _meaning(onnx.defs.get_schema(node.op_type)):
        raise CannotEvaluateError(f"{node.op_type} meant something else in opset {opset}")
    if sum(array.size for array in inputs if array is not None) > _REFERENCE_LIMIT:
        raise CannotEvaluateError(f"{node.op_type} is too slow to work out on inputs of this size")
    proto = ir.to_proto(node)
    proto.input[:] = [f"i{i}" if array is not None else "" for i, array in enumerate(inputs)]
    proto.output[:] = [f"o{i}" for i in range(len(node.outputs))]
    feeds = {f"i{i}": array for i, array in enumerate(inputs) if array is not None}
    graph = onnx.GraphProto(
        node=[proto],
        input=[onnx.ValueInfoProto(name=name) for name in feeds],
        output=[onnx.ValueInfoProto(name=name) for name in proto.output],
    )
    return tuple(ReferenceEvaluator(graph, opsets={"": opset}).run(None, feeds))


def _meaning(schema: onnx.defs.OpSchema) -> object:
    """What tells two versions of an operator apart: attributes with defaults, and inputs.

    The reference evaluator has most operators in their newest version only.
    """
    attributes = {
        name: (attr.type, attr.required, attr.default_value.SerializeToString(deterministic=True))
        for name, attr in schema.attributes.items()
    }
    return attributes, [put.name for put in schema.inputs], [put.name for put in schema.outputs]


def check(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    """Hold a result against the type and shape on record.

    Raises:
        CannotEvaluateError: it is another one.
    """
    if value.dtype is not None and value.dtype != dtype:
        raise CannotEvaluateError(f"it comes out as {dtype.name}, and is {value.dtype.name} on record")
    dims = value.shape.dims if value.shape is not None else shape
    if dims == shape:
        return
    if len(dims) != len(shape) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(dims, shape, strict=True)
    ):
        raise CannotEvaluateError(f"it has shape {list(shape)}, and {value.shape} is on record")
