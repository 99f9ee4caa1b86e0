"""The activation that several branches begin with."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, has_reference, sole_user
from onnxopt.rewrite import Edit

__all__ = ["Step", "common_step", "redone"]

Step = tuple[ir.Node, ...]
"""An activation: one node, or a gate and the Mul of it with what it reads."""

# fmt: off
_ACTIVATIONS = frozenset((
    "Abs", "Celu", "Clip", "Elu", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
))
# fmt: on


def common_step(values: Sequence[ir.Value]) -> list[Step] | None:
    """The activation that each of these values goes through and nothing else reads, if they do alike."""
    steps = [step for value in values if (step := _step(value))]
    alike = len(steps) == len(values) and all(_alike(step, steps[0]) for step in steps)
    return steps if alike else None


def _step(value: ir.Value) -> Step | None:
    users = tuple(dict.fromkeys(usage.node for usage in value.uses()))
    producer = value.producer()
    graph = producer.graph if producer is not None else None
    if value.is_graph_output() or any(node.domain or node.graph is not graph for node in users):
        return None
    if any(node.op_type in _ACTIVATIONS and has_reference(node) for node in users):
        return None
    gates = [node for node in users if node.op_type in _ACTIVATIONS and node.inputs[0] is value]
    if any(_is_computed(other) for node in gates for other in node.inputs[1:]):
        return None
    if len(gates) == len(users) == 1:
        return (gates[0],)
    if len(users) != 2 or len(gates) != 1:
        return None
    product = sole_user(gates[0].outputs[0])
    if product not in users or product is None or product.op_type != "Mul" or product in gates:
        return None
    return gates[0], product


def _alike(a: Step, b: Step) -> bool:
    if [node.op_type for node in a] != [node.op_type for node in b] or len(a[0].inputs) != len(b[0].inputs):
        return False
    attributes = [{name: attr.value for name, attr in step[0].attributes.items()} for step in (a, b)]
    pairs = zip(a[0].inputs[1:], b[0].inputs[1:], strict=True)
    return attributes[0] == attributes[1] and all(_same(x, y) for x, y in pairs)


def _is_computed(value: ir.Value | None) -> bool:
    """Whether a node makes the value, perhaps after the first of the branches."""
    return value is not None and value.producer() is not None and constant_of(value) is None


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is b:
        return True
    x, y = constant_array(a, 8), constant_array(b, 8)
    if x is None or y is None or (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    return x.tobytes() == y.tobytes()


def redone(edit: Edit, step: Step, value: ir.Value) -> ir.Value:
    """The activation of another value; constants that are nodes, and may come after it, are made anew."""
    first = step[0]
    inputs: list[ir.Value | None] = [value, *first.inputs[1:]]
    for place, bound in enumerate(inputs[1:], 1):
        tensor = constant_of(bound)
        if bound is not None and bound.producer() is not None and tensor is not None:
            inputs[place] = edit.constant(tensor, bound.name)
    gate = edit.op(first.op_type, inputs, first.attributes, name=first.name or "")
    return gate if len(step) == 1 else edit.op("Mul", (value, gate), name=step[1].name or "")
