"""The weights of a model, wherever they live, as what they stand for; and what of them is zero.

A weight is a stored constant (an initializer or a Constant node of any graph or function) that some operator
multiplies with, directly or behind operators that only move, cast or quantize it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxopt.boxes import Box
from onnxopt.evaluation import CannotEvaluateError, evaluate
from onnxopt.graph import (
    FLOATS,
    constant_array,
    constant_of,
    has_reference,
    int_attr,
    nested,
    roots,
    sizes_of,
)
from onnxopt.index import operator_of
from onnxopt.ledger import site_of
from onnxopt.pruning.levels import INTEGERS, Levels, Reader, levels_of, passes_on
from onnxopt.pruning.masks import Mask
from onnxopt.quantization.operands import CODES, MOVES
from onnxopt.quantization.weights import OPERANDS, block_axis, weight_axis
from onnxopt.streamed import Streamed, is_on_disk, pieces, read, sources

__all__ = ["LayerSparsity", "StoredWeight", "convolves_alone", "find_weights", "kept_elements", "sparsity"]

_PART = 1 << 22
"""Bytes that are looked at together."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A constant that is multiplied with.

    name: of the constant, of what it was before its numbers were shared, with a number where several graphs
    have one of that name. readers: at least one.
    reason: why its elements cannot be changed, in words that follow "the weight"; empty where they can.
    levels: where they do not stand for themselves.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    readers: tuple[Reader, ...]
    opset: int
    reason: str = ""
    levels: Levels | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return sizes_of(self.tensor)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.size

    @property
    def site(self) -> str:
        """Where it is read first."""
        return site_of(self.readers[0].node)

    @property
    def is_embedding(self) -> bool:
        """Whether rows of it are taken."""
        return any(reader.node.op_type == "Gather" for reader in self.readers)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return any(convolves_alone(reader.node, self.shape) for reader in self.readers)

    def stored(self) -> np.ndarray:
        """The elements as they are stored; those of a file are read, and do not stay in memory."""
        if is_on_disk(self.tensor):
            return read(self.tensor, tuple(slice(0, size) for size in self.shape))
        array: np.ndarray = self.tensor.numpy()
        return array

    def parts(self) -> Iterator[np.ndarray]:
        """The stored elements in order, flat, some at a time; all, in shape, where they have levels."""
        kind = self.tensor.dtype
        if self.levels is not None or kind.bitwidth % 8:
            yield self.stored()
        else:
            yield from (np.frombuffer(piece, kind.numpy()) for piece in pieces(self.tensor, _PART))

    def zeros(self, stored: np.ndarray) -> np.ndarray:
        """Which of the stored elements stand for zero."""
        return np.asarray((stored if self.levels is None else self.levels.steps(stored)) == 0)

    def numbers(self, stored: np.ndarray) -> np.ndarray:
        """What the stored elements stand for, in float32; without a scale, in steps."""
        if self.levels is None:
            with np.errstate(over="ignore"):
                return stored.astype(np.float32, copy=False)
        steps, scale = self.levels.steps(stored), self.levels.scale
        return steps if scale is None else np.asarray(steps * scale)

    def lines(self, along: Literal["inputs", "summands"]) -> np.ndarray:
        """Places of the elements in the flat stored array: int32 or int64 [lines, elements of a line].

        along: `summands`, all that one output channel adds up; `inputs`, the input channels of one output
        channel at one place of the kernel, which is what N:M patterns run along.

        Raises:
            CannotEvaluateError: what moves the weight cannot be followed, its readers disagree, or there is
                no such axis.
        """
        first, *others = ([*_lines(self, reader, along)] for reader in self.readers)
        if any(not np.array_equal(first[0], other[0]) for other in others):
            raise CannotEvaluateError("is added up along different axes")
        return first[0]

    def pruned(self, mask: Mask) -> ir.TensorProtocol:
        """The stored tensor with zeros where the mask is False; one that lies on disk stays there."""
        tensor, dtype = self.tensor, self.tensor.dtype
        if self.levels is None and is_on_disk(tensor):

            def box(wanted: Box) -> np.ndarray:
                part = read(tensor, wanted)
                return np.where(mask.array(wanted), part, np.zeros((), part.dtype))

            return Streamed(dtype, self.shape, box, sources(tensor) or frozenset())
        array = self.stored()
        zero = np.zeros((), array.dtype) if self.levels is None else self.levels.stored_zero(array.dtype)
        assert zero is not None  # else there is a reason
        return ir.Tensor(np.where(mask.array(), array, zero), dtype=dtype, name=tensor.name)

    def write(self, tensor: ir.TensorProtocol) -> None:
        """Let the constant be this tensor, of the same type and shape."""
        node = self.value.producer()
        if node is None:
            self.value.const_value = tensor
            return
        for name in tuple(node.attributes):
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", tensor)


@dataclass(frozen=True)
class LayerSparsity:
    """How much of a weight is zero.

    weight: its name. layer: first output of the node that reads it. operator: of that node. elements, zeros:
    how many, stored integers by what they stand for.
    """

    weight: str
    layer: str
    operator: str
    elements: int
    zeros: int

    @property
    def share(self) -> float:
        """Zeros of all elements."""
        return self.zeros / self.elements


def sparsity(model: ir.Model) -> tuple[LayerSparsity, ...]:
    """How much of each weight is zero, in the order in which the weights are stored."""
    return tuple(
        LayerSparsity(
            one.name,
            one.site,
            one.readers[0].node.op_type,
            one.size,
            sum(int(np.count_nonzero(one.zeros(part))) for part in one.parts()),
        )
        for one in find_weights(model)
    )


def kept_elements(model: ir.Model) -> dict[str, np.ndarray]:
    """The masks of a pruned model: name of a weight -> bool array, True where an element is not zero."""
    return {one.name: ~one.zeros(one.stored()) for one in find_weights(model)}


def find_weights(model: ir.Model) -> tuple[StoredWeight, ...]:
    """All weights of more than one dimension, in the order in which they are stored; embeddings, too."""
    found: list[StoredWeight] = []
    names: Counter[str] = Counter()
    for root in roots(model):
        for graph in (root, *nested(root)):
            for value in _constants(graph):
                one = _weight(value, root.opset_imports.get("", 1))
                if one is not None:
                    names[one.name] += 1
                    count = names[one.name]
                    found.append(one if count == 1 else replace(one, name=f"{one.name}#{count}"))
    return tuple(found)


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        if node.op_type == "Constant" and not node.domain:
            yield node.outputs[0]


def _weight(value: ir.Value, opset: int) -> StoredWeight | None:
    """The weight that a constant is; None where it is none."""
    tensor = value.const_value if value.is_initializer() else constant_of(value)
    if tensor is None or tensor.size < 2 or tensor.dtype == ir.DataType.STRING:
        return None
    readers, others = _read_by(value, tensor)
    flat = len(sizes_of(tensor)) < 2 and not any(reader.between for reader in readers)
    if not readers or flat:
        return None
    one = StoredWeight(value.name or "", value, tensor, tuple(readers), opset)
    if value.is_graph_input():
        return replace(one, reason="is a graph input (overridable; --freeze-initializers folds it)")
    if others:
        return replace(one, reason=others[0])
    if any(has_reference(reader.node) for reader in readers):
        return replace(one, reason="is read with an attribute that the caller of the function sets")
    first, *rest = (levels_of(reader, tensor) for reader in readers)
    if isinstance(first, str):
        return replace(one, reason=first)
    if first is None:
        return one if tensor.dtype in FLOATS else None  # plain integers
    if not all(isinstance(other, Levels) and other.same_zeros(first) for other in rest):
        return replace(one, reason="has several zero points")
    name = one.name.removesuffix(CODES) if first.book is not None else one.name
    one = replace(one, name=name, levels=first)
    if first.stored_zero(tensor.dtype.numpy()) is not None:
        return one
    shared = "shares numbers of which none is zero"
    return replace(
        one, reason="has a zero point that is no number of its type" if first.book is None else shared
    )


def _read_by(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[list[Reader], list[str]]:
    """The readers that multiply with a value, and what else is done with it."""
    readers, others = list[Reader](), list[str]()
    work: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(value, ())]
    while work:
        value, between = work.pop()
        if value.is_graph_output():
            others.append("is a graph output, too")
        for node, position in value.uses():
            operator = operator_of(node)
            if passes_on(node, position, tensor.size, tensor.dtype):
                work.append((node.outputs[0], (*between, node)))
            elif position in OPERANDS.get(operator, INTEGERS.get(operator, ())):
                readers.append(Reader(node, position, between))
            else:
                others.append(f"is also read by {node.op_type}")
    return readers, others


def _lines(
    weight: StoredWeight, reader: Reader, along: Literal["inputs", "summands"]
) -> Iterator[np.ndarray]:
    kind = np.int32 if weight.size < 1 << 31 else np.int64
    places = np.arange(weight.size, dtype=kind).reshape(weight.shape)
    for move in reader.between:
        if move.op_type in MOVES:
            others = [None if value is None else constant_array(value) for value in move.inputs[1:]]
            places = evaluate(move, [places, *others], weight.opset)[0]
    channels, inputs = _axes(reader, places.shape)
    if channels is None or inputs is None:
        raise CannotEvaluateError("has no axis that is added up")
    if along == "summands" and "Conv" in reader.node.op_type:
        yield np.moveaxis(places, channels, 0).reshape(places.shape[channels], -1)
    else:
        yield np.moveaxis(places, inputs, -1).reshape(-1, places.shape[inputs])


def _axes(reader: Reader, shape: Sequence[int]) -> tuple[int | None, int | None]:
    """The axes of output channels and of input channels."""
    node, position, _ = reader
    if operator_of(node) in OPERANDS:
        return weight_axis(node, position, shape), block_axis(node, position, shape)
    if "Conv" in node.op_type or int_attr(node, "transB", 0):
        return 0, 1
    return len(shape) - 1, len(shape) - 2


def convolves_alone(node: ir.Node, shape: Sequence[int]) -> bool:
    """Whether a node with a weight of this shape convolves each channel by itself."""
    groups = int_attr(node, "group", 1) if not has_reference(node) else 1
    if groups < 2 or len(shape) < 3:
        return False
    return groups == shape[0] if node.op_type == "ConvTranspose" else shape[1] == 1
