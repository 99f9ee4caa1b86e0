"""What a node costs in float32 and in int8 on ONNX Runtime's CPU provider: a linear model.

Int8 is often slower than float there: float convolutions run on blocked channels with whatever follows them
fused, while integer kernels gather their input tap by tap, and small or odd channel counts fall off the fast
paths. Times are of one thread at level ALL; U8 activations, S8 weights. The coefficients in `costs.toml` are
written by ``benchmarks/kernel_costs.py``; they model the target, not this machine at this minute.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, int_attr, ints_attr, sole_user, str_attr
from onnxopt.quantization.layouts import (
    ACTIVATIONS,
    Shapes,
    is_blocked,
    is_pooled_last,
    keeps_layout,
    producer,
)

__all__ = [
    "COLD_NS",
    "Costs",
    "NodeCost",
    "Shapes",
    "features",
    "keeps_layout",
    "node_cost",
    "row_of",
    "shipped_costs",
]

Features = tuple[float, ...]

_BLOCK = 16
"""Channels of one block of AVX-512 float32: counts are rounded up to it."""

_BROADCAST = ("Add", "Mul")
"""What runs a pixel at a time where one input has a number a channel."""

COLD_NS = {False: 500.0, True: 1000.0}
"""What a float and an integer kernel take longer in a net than in a chain of their like, where code and
weights are at hand. Chosen by hand, so that estimates for small nets agree with what whole candidates take
(kws_dscnn, yolox_nano, a text classifier); the order of magnitude counts: without it, many short islands of
int8 look cheap."""

_FREE = ("Constant", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""What copies nothing."""

_FLAT = (*_FREE, "Gather", "MatMul", "Slice", "Softmax", "Split")
"""What int8 with its channels last is transposed back for."""

_EMITTED = {"HardSigmoid": ("Add",), "HardSwish": ("Add", "Mul")}
"""The integer kernels of what has none of its own."""

_UNKNOWN = "Sub"
"""The row of operators that have none: one float kernel, an element at a time."""


@dataclass(frozen=True)
class NodeCost:
    """Nanoseconds of one thread.

    float_ns: 0 where the runtime fuses the node with its float producer. int8_ns: infinite where it has no
    integer kernel. apart_ns: what is added to float_ns where that producer runs in int8.
    """

    float_ns: float
    int8_ns: float
    apart_ns: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Coefficients for one version of the runtime on one kind of machine.

    rows: by kind of node, coefficients of `features` for float32 and int8, None where there is no kernel.
    borders: (ns, ns an element) of QuantizeLinear, DequantizeLinear, and the change of layout of each side.
    """

    runtime: str
    machine: str
    vnni: bool
    rows: Mapping[str, tuple[Features, Features | None]]
    borders: Mapping[str, Features]

    def quantize_ns(self, elements: int) -> float:
        """A QuantizeLinear of that many elements."""
        return COLD_NS[False] + _dot(self.borders["quantize"], (1, elements))

    def dequantize_ns(self, elements: int) -> float:
        """A DequantizeLinear of that many elements."""
        return COLD_NS[False] + _dot(self.borders["dequantize"], (1, elements))

    def layout_ns(self, elements: int, *, quantized: bool) -> float:
        """A change between the layout of convolutions and the graph's: blocked floats, channels-last int8."""
        return _dot(self.borders["transpose" if quantized else "reorder"], (1, elements))


@functools.cache
def shipped_costs() -> Costs:
    """The table that ships."""
    text = (importlib.resources.files("onnxopt.quantization") / "costs.toml").read_text(encoding="utf-8")
    held = tomllib.loads(text)
    rows = {
        kind: (tuple(row["float"]), tuple(row["int8"]) if "int8" in row else None)
        for kind, row in held["rows"].items()
    }
    borders = {name: tuple(row) for name, row in held["borders"].items()}
    return Costs(
        held["runtime"], held["machine"], held["vnni"], MappingProxyType(rows), MappingProxyType(borders)
    )


def node_cost(node: ir.Node, shapes: Shapes, table: Costs | None = None) -> NodeCost:
    """What the node costs on either side, without the QuantizeLinear and DequantizeLinear at its borders.

    shapes: the sizes of a value, all known. Raises what `shapes` raises.
    """
    table = table or shipped_costs()
    kind = row_of(node, shapes)
    cold = {False: 0.0, True: 0.0} if kind in _FREE else COLD_NS
    plain, integer = ((), ()) if kind in _FREE else table.rows.get(kind, table.rows[_UNKNOWN])
    plain_ns = cold[False] + _dot(plain, features(node, shapes, quantized=False))
    if kind == "MaxPool" and not is_pooled_last(node):
        integer = table.rows["MaxPool-plain"][1]
    parts = [table.rows[part][1] for part in _EMITTED[kind]] if kind in _EMITTED else [integer]
    int8_ns = sum(
        math.inf if part is None else cold[True] + _dot(part, features(node, shapes, quantized=True))
        for part in parts
    )
    if _saturates(node):
        int8_ns = 0.0
    elif _is_transposed(node, shapes):
        int8_ns += table.layout_ns(_count(shapes, node.inputs[0]), quantized=True)
    if _is_fused(node, shapes) or (node.op_type == "Sigmoid" and _silu_of(node) is not None):
        return NodeCost(0.0, int8_ns, plain_ns)
    if node.op_type == "Mul" and any(_silu_of(gate) is node for gate in map(producer, node.inputs)):
        silu_ns = cold[False] + _dot(table.rows["QuickGelu"][0], features(node, shapes, quantized=False))
        return NodeCost(silu_ns, int8_ns, max(plain_ns - silu_ns, 0.0))
    return NodeCost(plain_ns + _reordered_ns(node, shapes, table), int8_ns)


def row_of(node: ir.Node, shapes: Shapes) -> str:
    """The kind of node that a row of the table is about."""
    op = node.op_type
    if op in ("Conv", "ConvTranspose"):
        return _conv_row(node, shapes)
    if op in ("Gemm", "MatMul"):
        computed = all(constant_of(value) is None for value in node.inputs[:2])
        return "MatMul-computed" if computed else "MatMul"
    if op == "Resize":
        return f"Resize-{str_attr(node, 'mode', 'nearest')}"
    if op == "Softmax":
        last = int_attr(node, "axis", -1) in (-1, len(shapes(node.outputs[0])) - 1)
        return "Softmax" if last else "Softmax-inner"
    if op == "MaxPool" and not is_blocked(node.inputs[0], shapes):
        return "MaxPool-plain"
    if op in _BROADCAST and _is_broadcast(node, shapes):
        return f"{op}-broadcast"
    return op


def features(node: ir.Node, shapes: Shapes, *, quantized: bool) -> Features:
    """What the time is linear in.

    Layers: 1, multiply-accumulates, output elements, taps (pixels times kernel positions, of which int8
    gathers a row at once; for MatMul the elements of the weight), and what runs off the fast path. Others:
    1, elements, elements that windows read (with a broadcast input, pixels; of Concat, those of all inputs).
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        return _conv_features(node, shapes, quantized)
    if node.op_type in ("Gemm", "MatMul"):
        return _matmul_features(node, shapes)
    result = _count(shapes, node.outputs[0])
    elements = max(result, _count(shapes, node.inputs[0]))
    if node.op_type in _BROADCAST and _is_broadcast(node, shapes):
        return 1, elements, result // max(shapes(node.outputs[0])[1], 1)
    if node.op_type == "Concat" and len(shapes(node.outputs[0])) == 4:
        return 1, elements, len(node.inputs) * result // max(shapes(node.outputs[0])[1], 1)
    return 1, elements, result * math.prod(ints_attr(node, "kernel_shape") or (0,))


def _conv_row(node: ir.Node, shapes: Shapes) -> str:
    weight = shapes(_input(node, 1))
    group = int_attr(node, "group", 1)
    if node.op_type == "ConvTranspose":
        return "ConvTranspose"
    if weight[0] == group and weight[1] == 1:
        return "Conv-depthwise"
    if group > 1:
        return "Conv-grouped"
    if len(weight) != 4:
        return "Conv-1d"
    return "Conv-1x1" if math.prod(weight[2:]) == 1 else "Conv-kxk"


def _conv_features(node: ir.Node, shapes: Shapes, quantized: bool) -> Features:
    weight, group = shapes(_input(node, 1)), int_attr(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    grid = shapes(_input(node, 0) if transposed else node.outputs[0])
    outputs, reads = (weight[1] * group, weight[0]) if transposed else (weight[0], weight[1])
    pixels = grid[0] * math.prod(grid[2:])
    taps = pixels * math.prod(weight[2:])
    depthwise = outputs == group and reads == 1 and not transposed
    gathered = pixels * math.prod(weight[2:-1]) if quantized and group == 1 and not depthwise else taps
    padded = outputs if transposed else _round_up(outputs)
    depth = reads if quantized or group > 1 or reads < _BLOCK else _round_up(reads)
    macs = taps * padded * (1 if depthwise else depth)
    if len(weight) == 3 and group == 1 and not quantized:  # a product, computed 16 pixels at a time
        macs = macs // pixels * _round_up(pixels)
    if depthwise:
        ragged = macs if outputs % (_BLOCK if quantized else 4) else 0
    elif quantized:
        ragged = pixels * group * (bool(reads % 4) + bool(outputs // group % 4 or outputs // group < _BLOCK))
    else:
        odd = outputs // group % _BLOCK if group > 1 else reads > _BLOCK and reads % 4
        ragged = macs if odd else 0
    return 1, macs, pixels * padded, gathered * (1 if depthwise else group), ragged


def _matmul_features(node: ir.Node, shapes: Shapes) -> Features:
    left, right = shapes(_input(node, 0)), shapes(_input(node, 1))
    result = math.prod(shapes(node.outputs[0]))
    depth = left[0] if int_attr(node, "transA", 0) else left[-1]
    return 1, result * depth, result, math.prod(right), 0


def _round_up(channels: int) -> int:
    return math.ceil(channels / _BLOCK) * _BLOCK


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value


def _count(shapes: Shapes, value: ir.Value | None) -> int:
    return 1 if value is None else math.prod(shapes(value))


def _dot(row: Features, numbers: Features) -> float:
    return sum(a * b for a, b in zip(row, numbers, strict=False))


def _is_broadcast(node: ir.Node, shapes: Shapes) -> bool:
    """Whether one input has a number a channel; a row for the last axis is as fast as equal shapes."""
    sizes = [shapes(value) for value in node.inputs if value is not None]
    return any(math.prod(one) > 1 and one[-1] == 1 for one in sizes) and len(set(sizes)) > 1


def _saturates(node: ir.Node) -> bool:
    """Whether the range of its producer's quantized output does what the node does."""
    value = node.inputs[0] if node.inputs else None
    if node.op_type not in ("Clip", "Relu") or value is None or sole_user(value) is not node:
        return False
    low = constant_array(node.inputs[1]) if node.op_type == "Clip" and len(node.inputs) > 1 else None
    return node.op_type == "Relu" or (low is not None and low.size == 1 and low.item() == 0)


def _is_fused(node: ir.Node, shapes: Shapes) -> bool:
    """Whether float Conv or Gemm does the node's work too: an activation, or the sum with a residual."""
    layers = [value.producer() for value in node.inputs if value is not None and sole_user(value) is node]
    ops = [layer.op_type for layer in layers if layer is not None]
    if node.op_type == "Add":
        return "Conv" in ops and len({shapes(value) for value in node.inputs if value is not None}) == 1
    return node.op_type in ACTIVATIONS and bool({"Conv", "Gemm"} & {*ops})


def _silu_of(gate: ir.Node | None) -> ir.Node | None:
    """The Mul of x * Sigmoid(x), which is one kernel in float, of its Sigmoid."""
    if gate is None or gate.op_type != "Sigmoid":
        return None
    user = sole_user(gate.outputs[0])
    return user if user is not None and user.op_type == "Mul" and gate.inputs[0] in user.inputs else None


def _reordered_ns(node: ir.Node, shapes: Shapes, table: Costs) -> float:
    """The changes of layout around a float node that wants its channels in a row."""
    gates = node.op_type == "Mul" and _is_broadcast(node, shapes)
    if node.op_type in ("Conv", *_FREE) or (keeps_layout(node) and not gates):
        return 0.0
    moved = [value for value in dict.fromkeys(node.inputs) if is_blocked(value, shapes)]
    moved += [value for value in node.outputs if any(use.node.op_type == "Conv" for use in value.uses())]
    return sum(table.layout_ns(_count(shapes, value), quantized=False) for value in moved)


def _is_transposed(node: ir.Node, shapes: Shapes) -> bool:
    """Whether an int8 node wants another order of the axes than its input has."""
    if node.op_type == "Conv":
        return node.inputs[0] is not None and node.inputs[0].is_graph_input()
    return node.op_type in _FLAT and is_blocked(node.inputs[0], shapes)
