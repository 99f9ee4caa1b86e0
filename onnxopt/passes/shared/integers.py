"""Quantized values that have to be of one type, and how they all become another.

If q stands for (q - z) s, then q + d stands for the same number with the zero point z + d. Moving data and
choosing the largest commute with adding d, and QuantizeLinear saturates at the ends of a range that moves
along; so all that reads or makes the values only sees other zero points, and no number changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, int_attr, use_count, walk
from onnxopt.index import operator_of
from onnxopt.passes.shared.quantized import (
    QUANTIZE,
    QUANTIZED,
    SMALL,
    Port,
    carried,
    input_of,
    pads_with_number,
    shape_of,
)
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope
from onnxopt.streamed import is_on_disk, mapped

__all__ = ["Domain", "domains_of"]

_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_BLIND = ("Shape", "Size", "ArgMax", "ArgMin")
"""Operators that see no zero point."""


@dataclass
class Domain:
    """Quantized values that share a type, and the ports at which zero points say what they stand for.

    makers, readers: nodes with the port at which they quantize or read one of the values. constants: those
    values that come with the model. dynamic: an operator computes them from other data. stuck: why the type
    has to stay, or empty. first: names the domain.
    """

    first: ir.Value
    values: dict[ir.Value, None] = field(default_factory=dict)
    makers: dict[tuple[ir.Node, Port], None] = field(default_factory=dict)
    readers: dict[tuple[ir.Node, Port], None] = field(default_factory=dict)
    constants: list[ir.Value] = field(default_factory=list)
    dynamic: bool = False
    stuck: str = ""

    @property
    def dtype(self) -> ir.DataType | None:
        """The type that the values have, where one of them is known."""
        zeros = (input_of(node, port.zero) for node, port in (*self.makers, *self.readers))
        types = {dtype for value in (*self.values, *zeros) if (dtype := _dtype(value)) is not None}
        if not types and self.makers:  # no zero point: QuantizeLinear says the type itself
            types = {ir.DataType(int_attr(node, "output_dtype", 0) or _BYTES[1]) for node, _ in self.makers}
        return types.pop() if len(types) == 1 else None

    def zero_points(self) -> list[np.ndarray]:
        """The zero points at all ports, int64; of the shape of the scales where they are left out.

        Raises:
            Declined: one is computed at run time, or has an unknown shape.
        """
        return [_zero_point(node, port) for node, port in (*self.makers, *self.readers)]

    def require_range(self, dtype: ir.DataType, shift: int) -> None:
        """Raise Declined where the zero points, or what `zero_points` says, do not allow `retype`."""
        for zero in self.zero_points():
            if (zero + shift < dtype.min).any() or (zero + shift > dtype.max).any():
                raise Declined("a zero point would leave the range of the type")

    def retype(self, dtype: ir.DataType, shift: int, scope: Scope) -> list[ir.Node]:
        """Give all values another type and add `shift` to them; the nodes that see it."""
        ports = [*self.makers, *self.readers]
        zeros = self.zero_points()
        moved: dict[tuple[bytes, tuple[int, ...]], ir.Value] = {}
        for (node, port), zero in zip(ports, zeros, strict=True):
            key = (zero.tobytes(), zero.shape)
            given = input_of(node, port.zero)
            if key not in moved:
                like = given.name if given is not None and given.name else "zero_point"
                moved[key] = _stored((zero + shift).astype(dtype.numpy()), like, scope)
            if len(node.inputs) <= port.zero:
                node.resize_inputs(port.zero + 1)
            node.replace_input_with(port.zero, moved[key])
            _drop_unread(given)
            if int_attr(node, "output_dtype", 0) and (node, port) in self.makers:
                node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", dtype.value)
        for value in self.constants:
            _shift_constant(value, dtype, shift)
        for value in self.values:
            value.type = ir.TensorType(dtype)
        producers = (value.producer() for value in self.values)
        users = (use.node for value in self.values for use in value.uses())
        return [*(node for node in producers if node is not None), *users]


def domains_of(graph: ir.Graph) -> Iterator[Domain]:
    """The domains of 8 bits in a graph and those nested in it, each once."""
    seen: set[ir.Value] = set()
    for node in tuple(walk(graph)):
        row = QUANTIZED.get(operator_of(node))
        if row is None:
            continue
        data = [input_of(node, port.data) for port in row.ports(node)]
        for value in (*data, *(node.outputs[:1] if row.result else ())):
            if value is not None and value not in seen:
                domain = _domain(value)
                seen.update(domain.values)
                if domain.dtype in _BYTES:
                    yield domain


def _domain(first: ir.Value) -> Domain:
    domain, work = Domain(first), deque([first])
    while work:
        value = work.popleft()
        if value in domain.values:
            continue
        domain.values[value] = None
        work.extend(_above(domain, value))
        for use in value.uses():
            work.extend(_below(domain, use.node, use.idx))
        if value.is_graph_output():
            domain.stuck = "read as an output of its graph, which keeps its type"
    return domain


def _above(domain: Domain, value: ir.Value) -> list[ir.Value]:
    """What has the type of a value because of the node that makes it."""
    node = value.producer()
    if constant_of(value) is not None:
        domain.constants.append(value)
        return []
    if node is None:
        domain.stuck = "made outside of the graph: an input keeps its type"
        return []
    if not (carried(node) or (operator_of(node) in QUANTIZE and constant_of(node.inputs[0]) is not None)):
        domain.dynamic = True
    row, moves = QUANTIZED.get(operator_of(node)), carried(node)
    if row is not None and row.result is not None and value is node.outputs[0]:
        domain.makers[node, row.result] = None
        return _beside(node)
    if moves is not None and any(value is output for output in moves[1]):
        return _joined(domain, node, moves)
    domain.stuck = f"made by {node.op_type}, which gives no other type"
    return []


def _below(domain: Domain, node: ir.Node, place: int) -> list[ir.Value]:
    """What has the type of a value because of a node that reads it."""
    row, moves = QUANTIZED.get(operator_of(node)), carried(node)
    port = next((one for one in row.ports(node) if one.data == place), None) if row is not None else None
    if row is not None and port is not None:
        domain.readers[node, port] = None
        is_weight = row.weight is not None and port is row.inputs[row.weight]
        return [] if is_weight and constant_of(input_of(node, place)) is not None else _beside(node)
    if moves is not None and place in moves[0]:
        return _joined(domain, node, moves)
    if node.op_type not in _BLIND or node.domain:
        domain.stuck = domain.stuck or f"read by {node.op_type}, which is not known to take another type"
    return []


def _beside(node: ir.Node) -> list[ir.Value]:
    """Operands and result of an operator that runtimes have for one type of both; but a stored weight."""
    row = QUANTIZED[operator_of(node)]
    if not row.result or (not row.inputs and row.float_op != "Concat"):
        return []
    found = [node.outputs[0]]
    for index, port in enumerate(row.ports(node)):
        value = input_of(node, port.data)
        if value is not None and (index != row.weight or constant_of(value) is None):
            found.append(value)
    return found


def _joined(domain: Domain, node: ir.Node, moves: tuple[list[int], list[ir.Value]]) -> list[ir.Value]:
    places, outputs = moves
    if pads_with_number(node):  # which changes as zero points do
        domain.readers[node, Port(0, None, 2)] = None
    return [*(value for i in places if (value := node.inputs[i]) is not None), *outputs]


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    tensor = constant_of(value)
    return tensor.dtype if tensor is not None else None if value is None else value.dtype


def _zero_point(node: ir.Node, port: Port) -> np.ndarray:
    """The zero points at a port, int64 of the shape of the scales where they are left out."""
    given = input_of(node, port.zero)
    if given is not None:
        array = constant_array(given, SMALL)
        if array is None:
            raise Declined("a zero point is computed at run time")
        return array.astype(np.int64)
    shape = () if port.scale is None else shape_of(input_of(node, port.scale))
    if shape is None:
        raise Declined("a zero point is left out, and the shape of its scale is unknown")
    return np.zeros(shape, np.int64)


def _stored(array: np.ndarray, like: str, scope: Scope) -> ir.Value:
    """A new constant that the whole scope can read."""
    tensor = ir.Tensor(array)
    value = ir.Value(
        name=scope.fresh(like),
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    if scope.holds_initializers:
        scope.graph.register_initializer(value)
        return value
    value.const_value = None
    node = ir.Node("", "Constant", (), (ir.AttrTensor("value", tensor),), outputs=(value,))
    scope.graph.insert_before(scope.graph[0], node)
    return value


def _drop_unread(value: ir.Value | None) -> None:
    """Remove an initializer that nobody reads any more: below IR version 4 the runtime refuses those."""
    if value is None or not value.is_initializer() or value.graph is None or use_count(value):
        return
    if not (value.is_graph_input() or value.is_graph_output()):
        value.graph.initializers.pop(value.name or "")


def _shift_constant(value: ir.Value, dtype: ir.DataType, shift: int) -> None:
    tensor = constant_of(value)
    assert tensor is not None
    moved = mapped(lambda array: (array.astype(np.int16) + shift).astype(dtype.numpy()), [tensor], dtype)
    node = value.producer()
    moved = moved if is_on_disk(tensor) else ir.Tensor(moved.numpy())
    if node is None:
        value.const_value = moved
    else:
        node.attributes["value"] = ir.AttrTensor("value", moved)
