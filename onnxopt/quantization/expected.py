"""Whether quantization at run time is expected to be faster, by the table of kernel costs that ships.

A product looks at its activation twice, for the range and to round it, and then is the integer kernel of the
table: of 128 rows times 384 x 384 that gives 0.37 of the time of float32, where 0.34 was measured. Of an
embedding the rows that are read become floats again. Of recurrent layers the table has nothing.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxopt.data import Feeds
from onnxopt.graph import nodes
from onnxopt.ledger import site_of
from onnxopt.quantization.costs import Shapes, node_cost, shipped_costs
from onnxopt.quantization.finish import COUNTED
from onnxopt.quantization.shapes import measure_shapes

__all__ = ["TABLE", "expect"]

TABLE = "the table of kernel costs"
_MEASURE = "run without --no-bench to measure it"
_PRODUCTS = ("Gemm", "MatMul")


def expect(before: ir.Model, after: ir.Model, feeds: Feeds) -> tuple[bool, str]:
    """Whether the nodes that only `before` has in floating point are faster as they are in `after`, and why.

    Args:
        before, after: a pass that quantizes at run time lies between them.
        feeds: one sample, whose sizes count.
    """
    left = {site_of(node) for node in nodes(after) if node.op_type in COUNTED}
    rewritten = [node for node in nodes(before) if node.op_type in COUNTED and site_of(node) not in left]
    if not rewritten:
        return True, f"speed not measured: it is what {TABLE} says"
    table, known = shipped_costs(), measure_shapes(before, feeds)
    unknown = {node.op_type for node in rewritten if node.op_type not in (*_PRODUCTS, "Gather")}
    if unknown:
        return False, f"{TABLE} has no {min(unknown)}: {_MEASURE}"
    if any(value.name not in known for node in rewritten for value in node.inputs[:2] if value is not None):
        return False, f"{TABLE} needs sizes, those in subgraphs are not known: {_MEASURE}"

    def sizes(value: ir.Value) -> tuple[int, ...]:
        return known[value.name or ""]

    plain = integer = 0.0
    for node in rewritten:
        cost = node_cost(node, sizes, table)
        plain += cost.float_ns
        integer += cost.int8_ns
        if node.op_type in _PRODUCTS:
            integer += 2 * table.quantize_ns(_count(sizes, node.inputs[0]))
        else:
            integer += table.dequantize_ns(_count(sizes, node.outputs[0]))
    return integer < plain, f"{integer / plain:.2f}x the time by {TABLE}"


def _count(sizes: Shapes, value: ir.Value | None) -> int:
    return math.prod(sizes(value)) if value is not None else 1
