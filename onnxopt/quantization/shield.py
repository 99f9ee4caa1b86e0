"""What ONNX Runtime would quantize by itself, and how to keep it from that.

Its WeightBiasQuantization takes a layer with float weights that stands between a DequantizeLinear of one
scale and a QuantizeLinear, and quantizes the weight, with one scale for all of it. A DequantizeLinear with a
scale for each index of an axis, all equal, gives the same numbers, and it leaves the layer alone.

Between the two it also makes other operators integer kernels, which give the same numbers in about the time
of the float one with its borders, but for two. That of Softmax takes ten times as long as the float one, and
gives 0 for shares above the range, and for the only element of an axis; with that of AveragePool two small
convolutions around it took twice as long. A Concat of one operand in front stops it. That also stops
QDQPropagation, which moves borders over operators that only move numbers, where it ends the process: in
front of a value that the body of an If, Loop or Scan reads.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr, sizes_of, sole_user
from onnxopt.quantization.units import LAYERS, MOVES

__all__ = ["exposed"]

Axes = list[tuple[int, int]]

_SLOW = ("AveragePool", "Softmax")
"""Beside layers, what the runtime makes integer kernels of that are slower than the float ones."""


def exposed(
    graph: ir.Graph, chosen: Container[ir.Node], dequantized: Container[ir.Value]
) -> list[tuple[ir.Node, Axes]]:
    """The nodes whose first input needs a scale for each index of one of these axes, or to be copied.

    Args:
        graph: with QuantizeLinear and DequantizeLinear in place; not changed.
        chosen: the nodes that are to be integer kernels.
        dequantized: what DequantizeLinear of one scale gives.

    Returns:
        The node, and axes of its first input, each with its size. Without an axis a copy is needed.
    """
    found: list[tuple[ir.Node, Axes]] = []
    for node in graph:
        if node in chosen or not _is_exposed(node) or _origin(node) not in dequantized:
            continue
        reader = _first_reader(node) if node.op_type in LAYERS else node
        by_channel = node.op_type in LAYERS and reader.inputs[0] in dequantized
        found.append((reader, _known_axes(reader) if by_channel else []))
    return found


def _is_exposed(node: ir.Node) -> bool:
    """Whether the runtime does to a node what it should not, where its input is dequantized."""
    if node.domain:
        return False
    if node.op_type in MOVES:
        return any(use.node.graph is not node.graph for use in node.outputs[0].uses())
    written = _written_by(node)
    return written is not None and _ends_quantized(written)


def _written_by(node: ir.Node) -> ir.Value | None:
    """What a node writes that the runtime would quantize; MatMul with Add becomes a Gemm."""
    if node.op_type == "MatMul":
        add = sole_user(node.outputs[0])
        return add.outputs[0] if add is not None and add.op_type == "Add" else None
    return node.outputs[0] if node.op_type in (*LAYERS, *_SLOW) else None


def _origin(node: ir.Node) -> ir.Value | None:
    """A node's first input, before all that only moves numbers."""
    value = node.inputs[0]
    while value is not None and (mover := value.producer()) is not None and mover.op_type in MOVES:
        value = mover.inputs[0]
    return value


def _ends_quantized(value: ir.Value) -> bool:
    """Whether all that reads a value, but for what the runtime moves or drops, is one QuantizeLinear."""
    user = sole_user(value)
    while user is not None and user.op_type in ("Clip", "Relu", *MOVES):
        user = sole_user(user.outputs[0])
    return user is not None and user.op_type == "QuantizeLinear"


def _first_reader(node: ir.Node) -> ir.Node:
    """The node itself, or that which moves numbers for it alone and for those in between."""
    before = _input(node).producer()
    while before is not None and before.op_type in MOVES and sole_user(before.outputs[0]) is node:
        node, before = before, _input(before).producer()
    return node


def _known_axes(node: ir.Node) -> Axes:
    """The axes of a node's first input that are known to have a size of two at least, and that size."""
    found: Axes = []
    weight = constant_of(node.inputs[1]) if node.op_type in LAYERS else None
    if weight is not None and not int_attr(node, "transA", 0):
        first, second = sizes_of(weight)[:2]
        if node.op_type == "Conv":
            found.append((1, second * int_attr(node, "group", 1)))
        elif node.op_type == "ConvTranspose":
            found.append((1, first))
        else:
            found.append((-1, second if int_attr(node, "transB", 0) else first))
    shape = _input(node).shape
    found += [
        (i, size) for i, size in enumerate(shape.dims if shape is not None else ()) if isinstance(size, int)
    ]
    return [(axis, size) for axis, size in found if size > 1]


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
