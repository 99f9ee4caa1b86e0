"""How the operators that compute relate the axes they read and write."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxopt.evaluation import BROADCAST
from onnxopt.graph import int_attr
from onnxopt.pruning.attention import ATTENTION
from onnxopt.pruning.elements import Contraction, Elements, Ids, Layer, Term
from onnxopt.pruning.movement import MOVEMENT, Rule, UnrelatedError, align, output_axes
from onnxopt.pruning.shapes import SHAPES

__all__ = ["RELATIONS"]

_POINTWISE = str.split(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu Erf"
    " Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu"
    " Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_ADDS_UP = ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")
"""Reductions to which a zero adds nothing, however many elements there are."""
_REDUCTIONS = ("ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")


def _pointwise(e: Elements, node: ir.Node) -> None:
    source, target = _both(e, node)
    for a, b in zip(source, target, strict=True):
        e.same(a, b)
    for value in node.outputs[1:]:
        e.pin_value("a second output is used", value if value.name else None)


def _both(e: Elements, node: ir.Node) -> tuple[list[Ids], list[Ids]]:
    """The axes of the first input and of the first output, which are as many."""
    source, target = e.axes(node.inputs[0]), e.axes(node.outputs[0])
    if source is None or target is None or len(source) != len(target):
        raise UnrelatedError("the number of axes is not known")
    return source, target


def _broadcast(e: Elements, node: ir.Node) -> None:
    target = output_axes(e, node)
    for value in node.inputs:
        source = e.axes(value)
        if source is None or len(source) > len(target):
            raise UnrelatedError("the number of axes is not known")
        align(e, source, target)


def _along(e: Elements, node: ir.Node, reason: str, first: int, count: int | None = 1) -> None:
    """Element by element, but for the axes that are looked at as a whole."""
    _pointwise(e, node)
    axes = _both(e, node)[0]
    first %= max(len(axes), 1)
    e.pin(reason, *axes[first : None if count is None else first + count])


def _softmax(e: Elements, node: ir.Node) -> None:
    first, count = (-1, 1) if e.opset >= 13 else (1, None)
    _along(e, node, "are normalised together", int_attr(node, "axis", first), count)


def _layernorm(e: Elements, node: ir.Node) -> None:
    _along(e, node, "are normalised together", int_attr(node, "axis", -1), None)
    for value in node.inputs[1:]:
        if value is not None:
            align(e, e.axes(value) or (), _both(e, node)[0])


def _batchnorm(e: Elements, node: ir.Node) -> None:
    if int_attr(node, "training_mode", 0):
        raise UnrelatedError("BatchNormalization is in training mode")
    _pointwise(e, node)
    _vectors(e, node, 1, node.inputs[1:])


def _instancenorm(e: Elements, node: ir.Node) -> None:
    _along(e, node, "are normalised together", 2, None)
    _vectors(e, node, 1, node.inputs[1:])


def _groupnorm(e: Elements, node: ir.Node) -> None:
    _along(e, node, "are normalised together", 2, None)
    channels, groups = _both(e, node)[0][1], e.set_groups(node, int_attr(node, "num_groups", 1))
    if channels is None:
        raise UnrelatedError("the number of channels is not known")
    inner = e.numbered(len(channels) // len(groups))
    e.pin("are normalised together", inner)
    e.product(channels, (groups, inner), "are normalised together")
    for value in node.inputs[1:]:
        for ids in e.axes(value) or ():
            e.same(ids, groups if e.opset < 21 else channels)


def _vectors(e: Elements, node: ir.Node, axis: int, values: Sequence[ir.Value | None]) -> None:
    """One number for each element of an axis of the first input."""
    channels = _both(e, node)[0][axis]
    for value in values:
        for ids in e.axes(value) or ():
            e.same(channels, ids)


def _quantization(e: Elements, node: ir.Node) -> None:
    if int_attr(node, "block_size", 0):
        raise UnrelatedError("is quantized in blocks")
    _pointwise(e, node)
    source = _both(e, node)[0]
    for value in node.inputs[1:]:
        for ids in e.axes(value) or ():
            if ids is None or len(ids) != 1:
                e.same(source[int_attr(node, "axis", 1) % len(source)], ids)


def _conv(e: Elements, node: ir.Node) -> None:
    source, target = _both(e, node)
    weight = e.axes(node.inputs[1])
    if weight is None or weight[0] is None or weight[1] is None:
        raise UnrelatedError("the shape of the weight is not known")
    count = int_attr(node, "group", 1)
    e.same(source[0], target[0])
    e.pin("are the places of a convolution", *source[2:], *target[2:], *weight[2:])
    back = node.op_type == "ConvTranspose"
    outer, inner = (source[1], target[1]) if back else (target[1], source[1])
    # `outer` is axis 0 of the weight, all of it; `inner` is axis 1, of one group
    e.same(outer, weight[0])
    if count == 1:
        e.same(inner, weight[1])
    else:
        groups, share = e.set_groups(node, count), e.numbered(len(weight[0]) // count)
        e.product(outer, (groups, share), "is in groups of equal size")
        e.product(inner, (groups, weight[1]), "is in groups of equal size")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        e.same(target[1], (e.axes(node.inputs[2]) or [None])[0])
    e.layers.append(Layer(node, 1, int(back), 1 - int(back)))
    e.terms.append(Term(node, 1.0, (weight[0], weight[1])))
    e.contractions.append(Contraction(node, 0, 1))


def _matmul(e: Elements, node: ir.Node) -> None:
    a, b = e.axes(node.inputs[0]), e.axes(node.inputs[1])
    target = output_axes(e, node)
    if not a or not b:
        raise UnrelatedError("the number of axes is not known")
    summed = b[-2] if len(b) > 1 else b[-1]
    e.same(a[-1], summed)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    for ids, out in zip([*rows, *columns], target[len(target) - len(rows) - len(columns) :], strict=True):
        e.same(ids, out)
    batch = target[: len(target) - len(rows) - len(columns)]
    align(e, a[:-2], batch)
    align(e, b[:-2], batch)
    if len(b) > 1:
        e.layers.append(Layer(node, 1, len(b) - 1, len(b) - 2))
    if len(a) > 1:
        e.layers.append(Layer(node, 0, len(a) - 2, len(a) - 1))
    _product_cost(e, node, target, summed)


def _product_cost(e: Elements, node: ir.Node, target: Sequence[Ids], summed: Ids) -> None:
    e.terms.append(Term(node, 1.0, tuple(ids for ids in (*target, summed) if ids is not None)))
    first = 0 if node.op_type == "Gemm" and int_attr(node, "transA", 0) else -1
    e.contractions.append(Contraction(node, 0, first))


def _gemm(e: Elements, node: ir.Node) -> None:
    a, b, target = e.axes(node.inputs[0]), e.axes(node.inputs[1]), output_axes(e, node)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        raise UnrelatedError("the number of axes is not known")
    turned_a, turned_b = int_attr(node, "transA", 0), int_attr(node, "transB", 0)
    e.same(a[turned_a], target[0])
    e.same(b[1 - turned_b], target[1])
    e.same(a[1 - turned_a], b[turned_b])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        align(e, e.axes(node.inputs[2]) or (), target)
    e.layers.append(Layer(node, 1, 1 - turned_b, turned_b))
    _product_cost(e, node, target, b[turned_b])


def _recurrent(e: Elements, node: ir.Node) -> None:
    """X [.., in], W [directions, gates * hidden, in], R [directions, gates * hidden, hidden]."""
    x, w, r = (e.axes(value) for value in node.inputs[:3])
    if x is None or w is None or r is None or r[2] is None:
        raise UnrelatedError("the shapes of the weights are not known")
    hidden = r[2]
    for index, value in enumerate(node.inputs[1:8], 1):
        axes = e.axes(value)
        if axes is None or index in (4, 5, 6):
            continue
        e.pin("are the directions of a recurrent layer", axes[0])
        blocks = e.numbered(len(axes[1]) // len(hidden)) if axes[1] is not None else None
        e.pin("are the gates of a recurrent layer", blocks)
        e.product(axes[1], (blocks, hidden), "are the gates of a recurrent layer")
    e.same(x[-1], w[2])
    e.pin("are steps or sequences of a recurrent layer", *x[:-1])
    e.pin_value("are lengths of sequences", node.inputs[4] if len(node.inputs) > 4 else None)
    for value in (*node.inputs[5:7], *node.outputs):
        axes = e.axes(value)
        if axes is None or axes[-1] is None:
            if value is not None and (value.uses() or value.is_graph_output()):
                raise UnrelatedError("the shapes of what it carries are not known")
            continue
        e.pin("are steps, sequences or directions of a recurrent layer", *axes[:-1])
        e.same(axes[-1], hidden)
    e.layers += [Layer(node, 1, 1, 2), Layer(node, 2, 1, 2)]
    e.contractions += [Contraction(node, 0, 2), Contraction(node, 2, 2)]
    if w[1] is not None and w[2] is not None:
        inputs = len(w[2]) / (len(w[2]) + len(hidden))
        e.terms += [Term(node, inputs, (w[1], w[2])), Term(node, 1 - inputs, (w[1], hidden))]


def _reduce(e: Elements, node: ir.Node) -> None:
    source, target = e.axes(node.inputs[0]), e.axes(node.outputs[0])
    by_argument = node.op_type.startswith("Arg")
    axes = [int_attr(node, "axis", 0)] if by_argument else e.dims.ints(node, "axes", 1)
    if source is None or target is None or axes is None:
        raise UnrelatedError("the axes are not known")
    if not axes and int_attr(node, "noop_with_empty_axes", 0):
        return _pointwise(e, node)
    gone = {axis % len(source) for axis in axes or range(len(source))}
    keep = int_attr(node, "keepdims", 1)
    left = [axis for axis in range(len(source)) if axis not in gone]
    for place, axis in enumerate(left):
        e.same(source[axis], target[axis if keep else place])
    for axis in sorted(gone):
        if node.op_type in _ADDS_UP:
            e.contractions.append(Contraction(node, 0, axis))
        else:
            e.pin(f"{node.op_type} goes over them", source[axis])
    return None


def _pool(e: Elements, node: ir.Node) -> None:
    source, target = _both(e, node)
    e.same(source[0], target[0])
    e.same(source[1], target[1])
    e.pin("are the places of a pooling", *source[2:], *target[2:])
    for value in node.outputs[1:]:
        if value.name:
            raise UnrelatedError("the indices of a pooling are used")


def _sampled(e: Elements, node: ir.Node) -> None:
    """Places are looked up, of all channels the same: GridSample, RoiAlign."""
    source, target = _both(e, node)
    e.same(source[1], target[1])
    e.pin("are looked up", source[0], target[0], *source[2:], *target[2:])
    for value in node.inputs[1:]:
        e.pin_value("are looked up", value)


def _nothing(_: Elements, __: ir.Node) -> None:
    """Its axes are those that its readers see in it."""


RELATIONS: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **{f"com.microsoft::{op_type}": _broadcast for op_type in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")},
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys((*_ADDS_UP, *_REDUCTIONS, "ArgMax", "ArgMin"), _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layernorm),
    **dict.fromkeys(
        ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"), _pool
    ),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantization),
    **dict.fromkeys(("Constant", "ConstantOfShape"), _nothing),
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("GridSample", "RoiAlign"), _sampled),
    "BatchNormalization": _batchnorm,
    "Gemm": _gemm,
    "GroupNormalization": _groupnorm,
    "InstanceNormalization": _instancenorm,
    "MatMul": _matmul,
    **ATTENTION,
    **MOVEMENT,
    **SHAPES,
}
"""Operator -> what it says of axes; of all others, everything they read and write stays."""
