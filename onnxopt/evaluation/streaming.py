"""What a node gives for weights that stay on disk: a tensor that is computed when it is read, box by box.

Only for operators whose outcome does not depend on the elements: they fail, if so, before any is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.arrangement import ARRANGEMENT, spans, split_points
from onnxopt.evaluation.call import Call, CannotEvaluateError, is_float
from onnxopt.evaluation.elementwise import ELEMENTWISE
from onnxopt.evaluation.evaluator import check
from onnxopt.graph import int_attr, ints_attr
from onnxopt.streamed import concatenated, cropped, is_on_disk, mapped, reshaped, taken, transposed

__all__ = ["stream"]

Tensors = Sequence[ir.TensorProtocol]


def stream(
    node: ir.Node, inputs: Sequence[np.ndarray | ir.TensorProtocol | None], opset: int
) -> Tensors | None:
    """The outputs of a node of the default domain; None where they have to be worked out in memory.

    Args:
        node: without subgraphs and reference attributes.
        inputs: one for each input of the node, None where it is left out.
        opset: version of the default domain.

    Raises:
        CannotEvaluateError: with the reason.
    """
    streamer = _STREAMERS.get(node.op_type)
    if streamer is None or not any(map(_stays, inputs)) or any(item is None for item in inputs):
        return None
    tensors = [
        ir.Tensor(item) if isinstance(item, np.ndarray) else item for item in inputs if item is not None
    ]
    call = Call(node, [_shown(tensor) for tensor in tensors], opset, limit=0)
    try:
        outputs = streamer(call, tensors)
    except CannotEvaluateError:
        raise
    except Exception as error:
        raise CannotEvaluateError.at(node, error) from error
    for value, tensor in zip(node.outputs, outputs or (), strict=False):
        check(value, tensor.dtype, tuple(tensor.shape.numpy()))
    return outputs


def _stays(item: np.ndarray | ir.TensorProtocol | None) -> bool:
    return not isinstance(item, np.ndarray) and is_on_disk(item)


def _shown(tensor: ir.TensorProtocol) -> np.ndarray:
    """Of a tensor on disk an array that has its type and shape, and no memory."""
    if is_on_disk(tensor):
        return np.broadcast_to(np.zeros((), tensor.dtype.numpy()), tensor.shape.numpy())
    return tensor.numpy()


def _reshaped(call: Call, tensors: Tensors) -> Tensors | None:
    if not is_on_disk(tensors[0]):
        return None
    return (reshaped(tensors[0], np.asarray(ARRANGEMENT[call.node.op_type](call)).shape),)


def _transposed(call: Call, tensors: Tensors) -> Tensors:
    perm = ints_attr(call.node, "perm") or tuple(reversed(range(call.array().ndim)))
    return (transposed(tensors[0], perm),)


def _cropped(call: Call, tensors: Tensors) -> Tensors | None:
    return (cropped(tensors[0], spans(call, call.array().shape)),) if is_on_disk(tensors[0]) else None


def _split(call: Call, tensors: Tensors) -> Tensors:
    shape, axis = call.array().shape, int_attr(call.node, "axis", 0)
    points = [0, *split_points(call, shape[axis]), shape[axis]]
    whole = [slice(None)] * len(shape)
    parts = []
    for start, stop in pairwise(points):
        whole[axis] = slice(start, stop)
        parts.append(cropped(tensors[0], whole))
    return parts


def _concatenated(call: Call, tensors: Tensors) -> Tensors:
    return (concatenated(tensors, int_attr(call.node, "axis", 1)),)


def _taken(call: Call, tensors: Tensors) -> Tensors | None:
    indices, axis = call.array(1), int_attr(call.node, "axis", 0)
    size = call.array().shape[axis]
    if not is_on_disk(tensors[0]) or not np.all((indices >= -size) & (indices < size)):
        return None
    return (taken(tensors[0], indices, axis),)


def _mapped(call: Call, tensors: Tensors) -> Tensors | None:
    """Element by element, among floats: they do not fail, as a division of integers may."""
    if call.opset < 7 or not all(is_float(array.dtype) for array in call.present()):
        return None
    kernel, node, opset = ELEMENTWISE[call.node.op_type], call.node, call.opset

    def function(*blocks: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            limit = max(block.nbytes for block in blocks) * 8
            return np.asarray(kernel(Call(node, blocks, opset, limit)))

    dtype = function(*(np.ones((1,) * array.ndim, array.dtype) for array in call.present())).dtype
    if not is_float(dtype):
        return None
    shape = np.broadcast_shapes(*(array.shape for array in call.present()))
    return (mapped(function, tensors, ir.DataType.from_numpy(dtype), shape),)


_STREAMERS: dict[str, Callable[[Call, Tensors], Tensors | None]] = {
    "Concat": _concatenated,
    "Flatten": _reshaped,
    "Gather": _taken,
    "Identity": lambda _, tensors: (copy.copy(tensors[0]),),
    "Reshape": _reshaped,
    "Slice": _cropped,
    "Split": _split,
    "Squeeze": _reshaped,
    "Transpose": _transposed,
    "Unsqueeze": _reshaped,
    **dict.fromkeys(
        ("Abs", "Add", "Cast", "Div", "Mul", "Neg", "Reciprocal", "Relu", "Sqrt", "Sub"), _mapped
    ),
}
