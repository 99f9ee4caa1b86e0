"""The value of what depends on constants alone, worked out when it is asked for and not kept in the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.evaluator import evaluate
from onnxopt.graph import constant_of, has_reference, is_deterministic, subgraphs_of

__all__ = ["known_array"]

_DEEPEST = 16
"""Nodes in a row that are worked out."""


def known_array(value: ir.Value | None, opset: int, limit: int, depth: int = _DEEPEST) -> np.ndarray | None:
    """The elements of a value, or None where they are not constant or any value on the way is too large.

    limit: bytes that a value may have.
    """
    if value is None:
        return None
    tensor = constant_of(value)
    if tensor is not None:
        return tensor.numpy() if tensor.dtype != ir.DataType.STRING and tensor.nbytes <= limit else None
    node = value.producer()
    if node is None or node.domain or depth == 0 or len(node.outputs) != 1 or not node.inputs:
        return None
    if has_reference(node) or not is_deterministic(node) or any(True for _ in subgraphs_of(node)):
        return None
    inputs = [known_array(source, opset, limit, depth - 1) for source in node.inputs]
    if any(array is None and source is not None for array, source in zip(inputs, node.inputs, strict=True)):
        return None
    try:
        return evaluate(node, inputs, opset, limit)[0]
    except CannotEvaluateError:
        return None
