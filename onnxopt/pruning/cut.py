"""Take channels out of a graph: constants lose elements, and shapes follow, written down or computed.

What is cut added nothing where those who sum it up read zeros: the cut model computes what `mask` makes the
model as it was compute, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr, ints_attr, set_constant, use_count, walk
from onnxopt.index import operator_of
from onnxopt.pruning.attention import ATTENTION
from onnxopt.pruning.elements import Ids
from onnxopt.pruning.movement import reshape_target
from onnxopt.pruning.structure import Structure
from onnxopt.scope import Scope

__all__ = ["cut", "mask", "new_constant"]


def cut(structure: Structure, gone: np.ndarray) -> list[ir.Node]:
    """Cut channels out of the model in place; the nodes that were changed.

    Args:
        structure: of the model as it is.
        gone: bool [channels], true for those to cut; none of them pinned.
    """
    at = _Cut(structure, gone)
    changed = [node for node in walk(structure.scope.graph) if at.touches(node)]
    for node in changed:
        adapt = _ADAPTERS.get(operator_of(node))
        if adapt is not None:
            adapt(at, node)
    for value in list(structure.elements.known()):
        at.shorten(value)
    return changed


def mask(structure: Structure, gone: np.ndarray) -> None:
    """Multiply with zero, in place, what is summed up over the channels that are gone."""
    at = _Cut(structure, gone)
    for one in structure.elements.contractions:
        value = one.node.inputs[one.index]
        axes = at.axes(value)
        ids = axes[one.axis] if axes else None
        if value is None or ids is None or at.kept(ids).all():
            continue
        rest = len(axes) - one.axis % len(axes) - 1
        zeros = at.kept(ids).astype((value.dtype or ir.DataType.FLOAT).numpy()).reshape(-1, *(1,) * rest)
        at.compute(one.node, one.index, "Mul", zeros)


@dataclass(frozen=True)
class _Cut:
    structure: Structure
    gone: np.ndarray

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """Which elements stay, bool [elements]."""
        return np.asarray(~self.gone[self.structure.solution.channel[ids]])

    def axes(self, value: ir.Value | None) -> list[Ids]:
        return self.structure.elements.known().get(value) or [] if value is not None else []

    def is_shorter(self, ids: Ids) -> bool:
        return ids is not None and not self.kept(ids).all()

    def count(self, ids: Ids) -> int:
        """How many elements of an axis of known size stay."""
        assert ids is not None
        return int(self.kept(ids).sum())

    def touches(self, node: ir.Node) -> bool:
        """Whether an axis of what a node reads or writes loses elements."""
        values = (*node.inputs, *node.outputs)
        return any(self.is_shorter(ids) for value in values if value is not None for ids in self.axes(value))

    def shorten(self, value: ir.Value) -> None:
        """Take the elements out of a constant, and write down a value's new sizes."""
        axes = self.axes(value)
        shorter = [axis for axis, ids in enumerate(axes) if self.is_shorter(ids)]
        if not shorter:
            return
        if value.shape is not None:
            sizes = list(value.shape.dims)
            for axis in shorter:
                sizes[axis] = self.count(axes[axis])
            value.shape = ir.Shape(sizes)
        tensor = constant_of(value)
        if tensor is None:
            return
        array = tensor.numpy()
        for axis in shorter:
            ids = axes[axis]
            assert ids is not None
            array = array.compress(self.kept(ids), axis)
        set_constant(value, np.ascontiguousarray(array))

    def write(self, node: ir.Node, name: str, index: int, numbers: Sequence[int]) -> None:
        """Give a node other integers: in an attribute where it has that, else in a new constant."""
        old = node.inputs[index] if index < len(node.inputs) else None
        if name in node.attributes or (old is None and self.structure.elements.opset < 13):
            node.attributes[name] = ir.AttrInt64s(name, numbers)
            return
        dtype = np.int32 if old is not None and old.dtype == ir.DataType.INT32 else np.int64
        self.replace(node, index, np.array(numbers, dtype), name)

    def replace(self, node: ir.Node, index: int, array: np.ndarray, name: str) -> None:
        """Give a node a new constant; `name` is for one that had none."""
        old = node.inputs[index] if index < len(node.inputs) else None
        new = new_constant(self.structure.scope, node, array, (old.name if old else None) or name)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        if old is not None and constant_of(old) is not None and not use_count(old):
            _remove(old)

    def compute(self, node: ir.Node, index: int, op_type: str, *arrays: np.ndarray) -> None:
        """Let a node read what an operator makes of these constants and what it read."""
        scope, value = self.structure.scope, node.inputs[index]
        assert isinstance(node.graph, ir.Graph)
        assert value is not None
        name = scope.fresh(value.name or "")
        constants = [new_constant(scope, node, array, name) for array in arrays]
        made = ir.Node("", op_type, [*constants, value], num_outputs=1)
        made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = name, value.type, value.shape
        node.graph.insert_before(node, made)
        node.replace_input_with(index, made.outputs[0])


def new_constant(scope: Scope, node: ir.Node, array: np.ndarray, like: str) -> ir.Value:
    """A new constant in the graph of a node."""
    tensor, graph = ir.Tensor(array), node.graph
    assert isinstance(graph, ir.Graph)
    name = scope.fresh(like)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
    if scope.holds_initializers:
        value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        graph.register_initializer(value)
        return value
    made = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
    made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = name, kind, shape
    graph.insert_before(node, made)
    return made.outputs[0]


def _remove(constant: ir.Value) -> None:
    """Take out a constant that nobody reads any more."""
    producer, graph = constant.producer(), constant.graph
    if constant.is_graph_output() or graph is None:
        return
    if producer is None:
        graph.initializers.pop(constant.name or "")
    else:
        graph.remove(producer)


Adapter = Callable[[_Cut, ir.Node], None]


def _shape(at: _Cut, node: ir.Node) -> None:
    """The sizes that a Reshape, an Expand or a ConstantOfShape is told."""
    axes, e, index = at.axes(node.outputs[0]), at.structure.elements, int(node.op_type != "ConstantOfShape")
    if not any(map(at.is_shorter, axes)):
        return
    target = reshape_target(e, node) if node.op_type == "Reshape" else e.dims.ints(node, "shape", index)
    if target is not None:
        pairs = zip(target, axes[len(axes) - len(target) :], strict=True)
        numbers = [at.count(ids) if size > 1 and at.is_shorter(ids) else size for size, ids in pairs]
        at.write(node, "shape", index, numbers)
    else:
        sizes = at.axes(node.inputs[index])  # of an Expand, which may be told fewer than there are
        told = axes[len(axes) - at.count(sizes[0]) :] if sizes else axes
        numbers = [at.count(ids) if at.is_shorter(ids) else 0 for ids in told]
        at.compute(node, index, "Where", np.array(numbers) > 0, np.array(numbers))


def _split(at: _Cut, node: ir.Node) -> None:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if at.is_shorter(at.axes(node.inputs[0])[axis]):
        node.attributes.pop("num_outputs", None)
        at.write(node, "split", 1, [at.count(at.axes(value)[axis]) for value in node.outputs])


def _squeeze(at: _Cut, node: ir.Node) -> None:
    """Say which axes go: an axis of which one channel is left stays."""
    if at.structure.elements.dims.ints(node, "axes", 1) == []:
        axes = enumerate(at.axes(node.inputs[0]))
        at.write(node, "axes", 1, [axis for axis, ids in axes if ids is not None and len(ids) == 1])


def _slice(at: _Cut, node: ir.Node) -> None:
    source, dims = at.axes(node.inputs[0]), at.structure.elements.dims
    starts, ends, axes = (dims.ints(node, name, n) for n, name in enumerate(("starts", "ends", "axes"), 1))
    if starts is None or ends is None or axes is None:
        return
    for n, axis in enumerate(axes or range(len(starts))):
        ids = source[axis]
        if at.is_shorter(ids) and ids is not None:
            start, end, _ = slice(starts[n], ends[n]).indices(len(ids))
            starts[n], ends[n] = (int(at.kept(ids[:place]).sum()) for place in (start, end))
    at.write(node, "starts", 1, starts)
    at.write(node, "ends", 2, ends)


def _gather(at: _Cut, node: ir.Node) -> None:
    source = at.axes(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    ids, tensor = source[axis], constant_of(node.inputs[1])
    if not at.is_shorter(ids) or ids is None or tensor is None:
        return
    kept, indices = at.kept(ids), tensor.numpy() % len(ids)
    rank = (np.cumsum(kept) - 1)[indices]
    found = rank[kept[indices]] if rank.ndim else rank
    at.replace(node, 1, found.astype(indices.dtype), "indices")


def _pad(at: _Cut, node: ir.Node) -> None:
    dims, source, target = at.structure.elements.dims, at.axes(node.inputs[0]), at.axes(node.outputs[0])
    pads, axes = dims.ints(node, "pads", 1), dims.ints(node, "axes", 3)
    if pads is None or axes is None:
        return
    half = len(pads) // 2
    for n, axis in enumerate(axes or range(half)):
        a, b = source[axis], target[axis]
        if a is not None and b is not None and at.is_shorter(b):
            before = pads[n]
            pads[n], pads[n + half] = at.count(b[:before]), at.count(b[before + len(a) :])
    at.write(node, "pads", 1, pads)


def _resize(at: _Cut, node: ir.Node) -> None:
    target = at.axes(node.outputs[0])
    sizes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    axes = ints_attr(node, "axes") or range(len(target))
    if sizes is not None and sizes.size == len(axes):
        pairs = zip(sizes.numpy().tolist(), (target[axis] for axis in axes), strict=True)
        at.write(node, "sizes", 3, [at.count(ids) if at.is_shorter(ids) else size for size, ids in pairs])


def _counted(at: _Cut, node: ir.Node) -> None:
    """Attributes that say how many groups there are, or as many for each."""
    groups = at.structure.elements.groups_of(node)
    for name in _COUNTS:
        if groups is not None and name in node.attributes:
            each = int_attr(node, name, 1) // len(groups)
            node.attributes[name] = ir.AttrInt64(name, each * at.count(groups))


def _recurrent(at: _Cut, node: ir.Node) -> None:
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", at.count(at.axes(node.inputs[2])[2]))


_COUNTS = ("group", "kv_num_heads", "num_groups", "num_heads", "q_num_heads")

_ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "GroupNormalization", *ATTENTION), _counted),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("ConstantOfShape", "Expand", "Reshape"), _shape),
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
}
