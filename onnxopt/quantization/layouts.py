"""The order of axes that kernels keep: channels in blocks for float convolutions, last for integer ones."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["ACTIVATIONS", "Shapes", "is_blocked", "is_pooled_last", "keeps_layout", "producer"]

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


def is_pooled_last(pool: ir.Node) -> bool:
    """Whether an integer MaxPool on what comes from a convolution has channels last, and is not slow.

    The runtime leaves it so right behind a convolution, or where a convolution follows.
    """
    before = producer(pool.inputs[0])
    while before is not None and before.op_type in ("Clip", "Relu"):
        before = producer(before.inputs[0])
    return (before is not None and before.op_type == "Conv") or _leads_to_convolution(pool.outputs[0])


def _leads_to_convolution(value: ir.Value, depth: int = 3) -> bool:
    users = [usage.node for usage in value.uses()]
    if any(node.op_type == "Conv" for node in users):
        return True
    kept = [node.outputs[0] for node in users if keeps_layout(node)]
    return depth > 0 and any(_leads_to_convolution(one, depth - 1) for one in kept)
