"""How the sizes of a node's outputs follow from those of its inputs, where these have names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import onnx_ir as ir

from onnxopt.evaluation.sizes import Dim, Shape, broadcast, divide, is_natural, named, product
from onnxopt.graph import int_attr, ints_attr, str_attr

__all__ = ["BROADCAST", "KEEPERS", "SHAPES"]

_END = 2**31 - 1
"""A Slice that ends here or later takes all of an axis, by the ONNX text."""
_MOST = 2**44
"""More elements than this no tensor has."""
_SAME = str.split(
    "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh"
    " CumSum DequantizeLinear Dropout Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax"
    " Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Log LogSoftmax"
    " LpNormalization Mish Neg Not QuantizeLinear RMSNormalization Reciprocal Relu Round ScatterElements"
    " ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh"
    " ThresholdedRelu Trilu"
)
"""The first output has the shape of the first input."""
BROADCAST = str.split(
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max"
    " Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
)
_REDUCED = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


class Known(Protocol):
    """What a rule can ask."""

    def of(self, value: ir.Value | None) -> Shape | None: ...

    def integers(self, node: ir.Node, name: str, index: int) -> list[Dim] | None: ...

    def ints(self, node: ir.Node, name: str, index: int) -> list[int] | None: ...

    def unknown(self, sign: str = "") -> Dim: ...


Rule = Callable[[Known, ir.Node], Sequence[Shape | None]]
"""The shapes of a node's outputs; nothing, or None, where they are not known."""


def _same(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    return (known.of(node.inputs[0]),)


def _elementwise(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    shapes = _of_all(known, node.inputs)
    return (broadcast(shapes),) if shapes else ()


def _of_all(known: Known, values: Sequence[ir.Value | None]) -> list[Shape] | None:
    """The shapes of all of them, or None."""
    shapes = [shape for value in values if (shape := known.of(value)) is not None]
    return shapes if len(shapes) == len(values) else None


def _moved(rule: Callable[[Known, ir.Node, Shape], Shape | None]) -> Rule:
    """A rule for the one output that looks at the first input's shape."""

    def apply(known: Known, node: ir.Node) -> Sequence[Shape | None]:
        source = known.of(node.inputs[0])
        return () if source is None else (rule(known, node, source),)

    return apply


def _transpose(_: Known, node: ir.Node, source: Shape) -> Shape | None:
    return tuple(source[axis] for axis in ints_attr(node, "perm") or reversed(range(len(source))))


def _reshape(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    target = known.integers(node, "shape", 1)
    if target is None:
        return None
    if int_attr(node, "allowzero", 0) == 0:
        target = [
            source[axis] if size == 0 and axis < len(source) else size for axis, size in enumerate(target)
        ]
    # One size that is -1, or may be, follows from the others.
    sure = [size for size in target if is_natural(size)]
    rest = divide(product(source), product(sure)) if len(sure) == len(target) - 1 else None
    return tuple(s if is_natural(s) else known.unknown() if rest is None else rest for s in target)


def _flatten(_: Known, node: ir.Node, source: Shape) -> Shape | None:
    axis = int_attr(node, "axis", 1)
    cut = axis + len(source) if axis < 0 else axis
    return product(source[:cut]), product(source[cut:])


def _squeeze(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    axes = known.ints(node, "axes", 1)
    if axes == [] and all(isinstance(size, int) for size in source):
        return tuple(size for size in source if size != 1)
    gone = {axis % len(source) for axis in axes or ()}
    return tuple(size for axis, size in enumerate(source) if axis not in gone) if gone else None


def _unsqueeze(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    axes = known.ints(node, "axes", 1)
    if axes is None:
        return None
    rank, rest = len(source) + len(axes), iter(source)
    new = {axis % rank for axis in axes}
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def _concat(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    shapes = _of_all(known, node.inputs)
    if not shapes or len(set(map(len, shapes))) > 1 or "axis" not in node.attributes:
        return ()
    axis = int_attr(node, "axis", 1) % len(shapes[0])
    pairs = zip(*shapes, strict=True)
    one = [next((size for size in sizes if isinstance(size, int)), sizes[0]) for sizes in pairs]
    one[axis] = sum((shape[axis] for shape in shapes[1:]), shapes[0][axis])
    return (tuple(one),)


def _split(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    source, sizes, count = known.of(node.inputs[0]), known.integers(node, "split", 1), len(node.outputs)
    if source is None:
        return ()
    axis = int_attr(node, "axis", 0) % len(source)
    even = None if sizes is None else divide(source[axis], count)
    parts = sizes or [known.unknown() if even is None else even for _ in range(count)]
    return [(*source[:axis], part, *source[axis + 1 :]) for part in parts]


def _slice(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (known.integers(node, name, i) for i, name in enumerate(names, 1))
    if starts is None or ends is None or axes is None or steps is None:
        return None
    shape, count = list(source), len(starts)
    for start, end, axis, step in zip(starts, ends, axes or range(count), steps or [1] * count, strict=True):
        if not isinstance(axis, int):
            return None
        kept = _kept(source, axis, start, end, step)
        shape[axis] = known.unknown() if kept is None else kept
    return tuple(shape)


def _kept(source: Shape, axis: int, start: Dim, end: Dim, step: Dim) -> Dim | None:
    """How much of an axis a Slice keeps."""
    size = source[axis]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int):
        return len(range(*slice(start, end, step).indices(size))) if step > 0 else None
    if (start, step) != (0, 1):
        return None
    elements = end * math.prod(s for s in source if isinstance(s, int)) if isinstance(end, int) else 0
    if end == size or elements > _MOST or (isinstance(end, int) and end >= _END):
        return size
    if not is_natural(end) or size == 0:
        return None
    return named(f"least({', '.join(sorted(map(str, (size, end))))})")


def _gather(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    indices, axis = known.of(node.inputs[1]), int_attr(node, "axis", 0) % max(len(source), 1)
    return None if indices is None else (*source[:axis], *indices, *source[axis + 1 :])


def _gather_elements(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    return (known.of(node.inputs[1]),)


def _gather_nd(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    indices = known.of(node.inputs[1])
    depth = indices[-1] if indices else None
    if indices is None or not isinstance(depth, int):
        return None
    return (*indices[:-1], *source[int_attr(node, "batch_dims", 0) + depth :])


def _expand(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    target = known.integers(node, "shape", 1)
    return broadcast([source, tuple(target)]) if target is not None and all(map(is_natural, target)) else None


def _tile(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    repeats = known.integers(node, "repeats", 1)
    if repeats is None or len(repeats) != len(source):
        return None
    return tuple(size * times for size, times in zip(source, repeats, strict=True))


def _filled(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    sizes = known.integers(node, "input", 0)
    return (tuple(sizes),) if sizes is not None and all(map(is_natural, sizes)) else ()


def _reduce(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    by_argument = node.op_type.startswith("Arg")
    axes = [int_attr(node, "axis", 0)] if by_argument else known.ints(node, "axes", 1)
    if axes is None:
        return None
    if not axes and int_attr(node, "noop_with_empty_axes", 0):
        return source
    gone, keep = {axis % len(source) for axis in axes or range(len(source))}, int_attr(node, "keepdims", 1)
    return tuple(1 if axis in gone else s for axis, s in enumerate(source) if keep or axis not in gone)


def _matmul(known: Known, node: ir.Node, a: Shape) -> Shape | None:
    b = known.of(node.inputs[1])
    if not a or not b:
        return None
    return (*broadcast([a[:-2], b[:-2]]), *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _gemm(known: Known, node: ir.Node, a: Shape) -> Shape | None:
    b = known.of(node.inputs[1])
    if len(a) != 2 or b is None or len(b) != 2:
        return None
    return a[int_attr(node, "transA", 0)], b[1 - int_attr(node, "transB", 0)]


def _global_pool(_: Known, __: ir.Node, source: Shape) -> Shape | None:
    return (*source[:2], *(1 for _ in source[2:]))


def _window(known: Known, node: ir.Node, source: Shape) -> Shape | None:
    """Conv and pooling: ((size + pads - reach) / stride rounded down) + 1 along each spatial axis."""
    weight = known.of(node.inputs[1]) if node.op_type == "Conv" else None
    reaches = ints_attr(node, "kernel_shape") or (weight or ())[2:]
    rank, odd = (
        len(source) - 2,
        str_attr(node, "auto_pad", "NOTSET") != "NOTSET" or int_attr(node, "ceil_mode", 0),
    )
    if len(reaches) != rank or (node.op_type == "Conv" and weight is None):
        return None
    pads, ones = ints_attr(node, "pads") or (0,) * 2 * rank, (1,) * rank
    steps, gaps = ints_attr(node, "strides") or ones, ints_attr(node, "dilations") or ones
    spatial = []
    for axis, size in enumerate(source[2:]):
        room = size + pads[axis] + pads[axis + rank] - (reaches[axis] - 1) * gaps[axis] - 1
        count = divide(room, steps[axis])
        count = named(f"floor(({room}) / {steps[axis]})") if count is None else count
        spatial.append(known.unknown() if odd else count + 1)
    return (source[0], source[1] if weight is None else weight[0], *spatial)


def _embedded(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    ids, table = known.of(node.inputs[0]), known.of(node.inputs[2])
    return () if ids is None or table is None else ((*ids, table[-1]),)


def _attention(known: Known, node: ir.Node) -> Sequence[Shape | None]:
    """Of ONNX's domain; of the runtime's with a query, a key and a value of rank 3 each."""
    query, value = known.of(node.inputs[0]), known.of(node.inputs[2])
    if query is None or value is None or len(query) != len(value) or len(query) not in (3, 4):
        return ()
    if len(query) == 4:
        return ((*query[:3], value[-1]),)
    heads, groups = int_attr(node, "q_num_heads", 1), int_attr(node, "kv_num_heads", 1)
    width = divide(value[-1] * heads, groups)
    return () if width is None else ((*query[:2], width),)


KEEPERS = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization", "RotaryEmbedding")
"""Operators of the runtime whose output has the shape of the first input."""

SHAPES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **{f"com.microsoft::{op_type}": _same for op_type in (*KEEPERS, "SkipSimplifiedLayerNormalization")},
    "com.microsoft::EmbedLayerNormalization": _embedded,
    **dict.fromkeys(("Attention", "com.microsoft::MultiHeadAttention"), _attention),
    **dict.fromkeys(BROADCAST, _elementwise),
    **dict.fromkeys(("ArgMax", "ArgMin", *(f"Reduce{kind}" for kind in _REDUCED)), _moved(_reduce)),
    **dict.fromkeys(("AveragePool", "Conv", "MaxPool"), _moved(_window)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _moved(_global_pool)),
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _moved(_expand),
    "Flatten": _moved(_flatten),
    "Gather": _moved(_gather),
    "GatherElements": _gather_elements,
    "GatherND": _moved(_gather_nd),
    "Gemm": _moved(_gemm),
    "MatMul": _moved(_matmul),
    "Reshape": _moved(_reshape),
    "Slice": _moved(_slice),
    "Split": _split,
    "Squeeze": _moved(_squeeze),
    "Tile": _moved(_tile),
    "Transpose": _moved(_transpose),
    "Unsqueeze": _moved(_unsqueeze),
}
