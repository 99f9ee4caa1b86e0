"""What a graph costs to run: multiply-accumulates and live activation bytes, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.graph import constant_array, int_attr, subgraphs_of, walk
from onnxopt.inspection.amounts import UNKNOWN, ZERO, Amount, product
from onnxopt.inspection.contents import op_name
from onnxopt.inspection.sizes import Shapes

__all__ = ["NodeCost", "costs", "has_cost", "layer_macs", "macs_of", "multiplies", "sizes_read"]

Cost = Callable[[ir.Node, Shapes], Amount]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _conv(weight: int) -> Cost:
    """Each output element sums over ``W[1:]``, W being (C_out, C_in / group, *kernel)."""

    def cost(node: ir.Node, at: Shapes) -> Amount:
        dims = at.dims(_input(node, weight))
        return at.elements(node.outputs[0]) * product(None if dims is None else dims[1:])

    return cost


def _conv_transpose(node: ir.Node, at: Shapes) -> Amount:
    """Each input element is spread over ``W[1:]``, W being (C_in, C_out / group, *kernel)."""
    dims = at.dims(_input(node, 1))
    return at.elements(_input(node, 0)) * product(None if dims is None else dims[1:])


def _matmul(node: ir.Node, at: Shapes) -> Amount:
    """Each output element sums over K, the last axis of A, or the one before where ``transA`` is set."""
    return at.elements(node.outputs[0]) * at.dim(_input(node, 0), -2 if int_attr(node, "transA", 0) else -1)


def _matmul_nbits(node: ir.Node, at: Shapes) -> Amount:
    return at.elements(_input(node, 0)) * Amount.of(int_attr(node, "N", 0))


def _recurrent(node: ir.Node, at: Shapes) -> Amount:
    """X is (steps, batch, in) or (batch, steps, in): each step of each sequence meets all of W and R."""
    weights = at.elements(_input(node, 1)) + at.elements(_input(node, 2))
    return at.dim(_input(node, 0), 0) * at.dim(_input(node, 0), 1) * weights


def _einsum(node: ir.Node, at: Shapes) -> Amount:
    """Output elements times the extents summed away, once for each operand after the first."""
    left, arrow, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    letters = left.replace(",", "").replace(".", "")
    summed = {letter for letter in letters if (letter not in right if arrow else letters.count(letter) > 1)}
    extents = {letter: _extent(terms, letter, node, at) for letter in sorted(summed)}
    return at.elements(node.outputs[0]) * product(extents.values()) * Amount.of(len(terms) - 1)


def _extent(terms: Sequence[str], letter: str, node: ir.Node, at: Shapes) -> Amount:
    operand = next(index for index, term in enumerate(terms) if letter in term)
    before, _, after = terms[operand].partition("...")
    axis = before.index(letter) if letter in before else after.index(letter) - len(after)
    return at.dim(_input(node, operand), axis)


def _attention(node: ir.Node, at: Shapes) -> Amount:
    """Q K^T and P V: every element of Q and of the output meets all keys, the past ones included."""
    past = at.dim(_input(node, 4), -2) if _input(node, 4) is not None else ZERO
    keys = at.dim(_input(node, 1), -2) + past
    return (at.elements(_input(node, 0)) + at.elements(node.outputs[0])) * keys


_COSTS: dict[str, Cost] = {
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "DeformConv": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"), _matmul),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Einsum": _einsum,
    "Attention": _attention,
    "com.microsoft.FusedConv": _conv(1),
    **dict.fromkeys(("com.microsoft.FusedMatMul", "com.microsoft.FusedGemm", "com.microsoft.QGemm"), _matmul),
    **dict.fromkeys(("com.microsoft.MatMulIntegerToFloat", "com.microsoft.DynamicQuantizeMatMul"), _matmul),
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.DynamicQuantizeLSTM": _recurrent,
}


@dataclass(frozen=True)
class NodeCost:
    """One node; ``macs`` and ``output_bytes`` of one execution, ``live_bytes`` while it runs.

    A control-flow node's ``macs`` are its body's: an If takes the costlier branch, a Loop and a Scan multiply
    by their trips (``trips(name)`` where the number is not constant). ``scope`` names the control-flow nodes
    around it.
    """

    name: str
    op: str
    scope: str
    macs: Amount
    output_bytes: Amount
    live_bytes: Amount


def has_cost(node: ir.Node) -> bool:
    """Whether the node's MACs are counted; standard ops without an entry have none to speak of."""
    return op_name(node) in _COSTS or node.domain in ("", "ai.onnx")


def multiplies(node: ir.Node) -> bool:
    """Whether it is an operator whose multiply-accumulates are counted."""
    return op_name(node) in _COSTS


def sizes_read(node: ir.Node) -> Iterator[ir.Value]:
    """The values whose sizes tell what the node costs."""
    if op_name(node) in _COSTS:
        yield from (value for value in (*node.inputs, *node.outputs) if value is not None and value.name)
    elif node.op_type == "Scan":
        yield from (value for value in node.inputs if value is not None)


def layer_macs(graph: ir.Graph, at: Shapes) -> Iterator[tuple[ir.Node, Amount]]:
    """The nodes that multiply, those in bodies too, and what one execution of each costs."""
    for node in walk(graph):
        cost = _COSTS.get(op_name(node))
        if cost is not None:
            yield node, cost(node, at)


def macs_of(graph: ir.Graph, at: Shapes, scope: str = "") -> Amount:
    """Multiply-accumulates of one run of a graph of a model with known shapes."""
    return Amount.total(_macs_with_bodies(graph, at, scope))


def _macs_with_bodies(graph: ir.Graph, at: Shapes, scope: str) -> Iterator[Amount]:
    for node in graph:
        inside = _inside(node, scope)
        yield _node_macs(node, at, [macs_of(body, at, inside) for body in subgraphs_of(node)], inside)


def costs(graph: ir.Graph, at: Shapes, scope: str = "", outer: Amount = ZERO) -> Iterator[NodeCost]:
    """The nodes of a graph of a model with known shapes, in order, each followed by those of its subgraphs.

    Activations are live from their producer (graph inputs: from the start) to their last reader (graph
    outputs: to the end); constants are not counted, nor what a runtime saves by working in place. `outer` is
    live all along.
    """
    last = _last_uses(graph)
    live = Amount.total((outer, *(at.nbytes(value) for value in graph.inputs if value in last)))
    for position, node in enumerate(graph):
        inside = _inside(node, scope)
        outputs = [value for value in node.outputs if value.name and node.op_type != "Constant"]
        produced = Amount.total(map(at.nbytes, outputs))
        live += produced
        bodies = [list(costs(body, at, inside, live)) for body in subgraphs_of(node)]
        peak = max((live, *(row.live_bytes for body in bodies for row in body)), key=_weight)
        macs = _node_macs(node, at, [_sum_macs(body, inside) for body in bodies], inside)
        yield NodeCost(_label(node), op_name(node), scope, macs, produced, peak)
        for body in bodies:
            yield from body
        ended = {value for value in (*_read(node), *outputs) if last.get(value, position) == position}
        live -= Amount.total(at.nbytes(value) for value in ended if _is_activation(value, graph))


def _label(node: ir.Node) -> str:
    return node.name or next((out.name for out in node.outputs if out.name), None) or node.op_type


def _inside(node: ir.Node, scope: str) -> str:
    return f"{scope}/{_label(node)}" if scope else _label(node)


def _sum_macs(rows: Iterable[NodeCost], scope: str) -> Amount:
    return Amount.total(row.macs for row in rows if row.scope == scope)


def _weight(amount: Amount) -> int:
    return amount.weight


def _is_activation(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.graph is graph and producer.op_type != "Constant"
    return value.graph is graph and not value.is_initializer()


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for body in subgraphs_of(node):
        for inner in body:
            yield from _read(inner)
        yield from body.outputs


def _last_uses(graph: ir.Graph) -> dict[ir.Value, int]:
    """The position of each activation's last reader; graph outputs live past the last node."""
    last = {}
    for position, node in enumerate(graph):
        last.update(dict.fromkeys((v for v in _read(node) if _is_activation(v, graph)), position))
    last.update(dict.fromkeys((v for v in graph.outputs if _is_activation(v, graph)), len(graph)))
    return last


def _node_macs(node: ir.Node, at: Shapes, bodies: Sequence[Amount], inside: str) -> Amount:
    cost = _COSTS.get(op_name(node))
    if cost is not None:
        return cost(node, at)
    function = at.functions.get(node.op_identifier())
    if function is not None:
        return UNKNOWN if any(map(_may_cost, walk(function.graph))) else ZERO
    if not any(body.terms for body in bodies):
        return ZERO
    if node.op_type == "Loop":
        return bodies[0] * _trips(node, inside)
    if node.op_type == "Scan":
        axes = node.attributes.get("scan_input_axes")
        first = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
        return bodies[0] * at.dim(_input(node, first), axes.as_ints()[0] if axes else 0)
    return max(bodies, key=_weight) * (UNKNOWN if node.op_type == "SequenceMap" else Amount.of(1))


def _may_cost(node: ir.Node) -> bool:
    return op_name(node) in _COSTS or not has_cost(node)


def _trips(node: ir.Node, name: str) -> Amount:
    count = constant_array(node.inputs[0])
    return Amount.symbol(f"trips({name})") if count is None else Amount.of(int(count.item()))
