"""What ONNX Runtime would quantize by itself, and how to keep it from that.

Its WeightBiasQuantization takes a layer with float weights that stands between a DequantizeLinear of one
scale and a QuantizeLinear, and quantizes the weight, with one scale for all of it. Operators that only move
numbers do not stop it, as it moves borders over them. A DequantizeLinear with a scale for each index of an
axis, all equal, gives the same numbers, and it leaves the layer alone.

Between the two it also makes Softmax an integer kernel, which takes ten times as long as the float one and
is wrong for an axis of one element. A Concat of one operand in front stops it.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr, sizes_of, sole_user
from onnxopt.quantization.units import LAYERS, MOVES

__all__ = ["exposed_layers", "exposed_softmax"]


def exposed_layers(
    graph: ir.Graph, chosen: Container[ir.Node], dequantized: Container[ir.Value]
) -> list[tuple[ir.Node, int, int]]:
    """The nodes whose first input should have a scale for each index of an axis: node, axis, its size.

    Args:
        graph: with QuantizeLinear and DequantizeLinear in place; not changed.
        chosen: the nodes that are to be integer kernels.
        dequantized: what DequantizeLinear of one scale gives.

    A layer of which no size of two or more is known is left out.
    """
    found = []
    for node in graph:
        written = None if node in chosen else _written_by(node)
        reader = _first_reader(node) if written is not None and _ends_quantized(written) else None
        if reader is not None and reader.inputs[0] in dequantized:
            found += [(reader, *one) for one in _known_axis(reader)[:1]]
    return found


def exposed_softmax(
    graph: ir.Graph, chosen: Container[ir.Node], dequantized: Container[ir.Value]
) -> list[ir.Node]:
    """Each Softmax that should read a copy."""
    found = [node for node in graph if node.op_type == "Softmax" and not node.domain and node not in chosen]
    return [
        node
        for node in found
        if _ends_quantized(node.outputs[0]) and _first_reader(node).inputs[0] in dequantized
    ]


def _written_by(node: ir.Node) -> ir.Value | None:
    """What a layer writes whose weight the runtime would quantize; MatMul with Add becomes its Gemm."""
    if node.domain or node.op_type not in LAYERS:
        return None
    add = sole_user(node.outputs[0]) if node.op_type == "MatMul" else None
    if node.op_type == "MatMul" and (add is None or add.op_type != "Add"):
        return None
    return node.outputs[0] if add is None else add.outputs[0]


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


def _known_axis(node: ir.Node) -> list[tuple[int, int]]:
    """The axes of a node's first input that are known to have a size of two at least, and that size."""
    found = []
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
