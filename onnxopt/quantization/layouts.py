"""The order of axes that kernels keep: channels in blocks for float convolutions, last for integer ones."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["ACTIVATIONS", "Shapes", "is_blocked", "keeps_layout", "producer"]

Shapes = Callable[[ir.Value], tuple[int, ...]]

ACTIVATIONS = ("Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
"""What float convolutions and Gemm compute on their way out."""

_BLOCKED = (
    *ACTIVATIONS,
    "Add",
    "AveragePool",
    "Concat",
    "GlobalAveragePool",
    "MaxPool",
    "Mul",
    "QuickGelu",
    "Resize",
)
"""What keeps float channels in blocks, where others get a ReorderOutput and a ReorderInput, and int8 last."""


def keeps_layout(node: ir.Node) -> bool:
    """Whether what a node writes has the order of axes that it reads: convolutions have one of their own."""
    return node.op_type in _BLOCKED


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes an operand, if any."""
    return None if value is None else value.producer()


def is_blocked(value: ir.Value | None, shapes: Shapes, depth: int = 4) -> bool:
    """Whether a value comes from a convolution, over no more than `depth` operators that keep its layout."""
    node = producer(value)
    if node is None or not depth:
        return False
    if node.op_type == "Conv":
        return len(shapes(node.outputs[0])) == 4
    return keeps_layout(node) and is_blocked(node.inputs[0], shapes, depth - 1)
