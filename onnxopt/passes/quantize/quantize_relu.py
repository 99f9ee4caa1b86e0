"""Use all of uint8 for values that are never negative, and round once where a Relu follows.

Before: q = QuantizeLinear(Relu(x), s, 0)      0: int8, or the middle 128 of uint8
After:  q = QuantizeLinear(Relu(x), s, 0)      0: uint8; and all that reads q likewise

Before: q = QuantizeLinear(Relu(DequantizeLinear(QuantizeLinear(x, s, z), s, z)), t, w)
After:  q = QuantizeLinear(Relu(x), t, w)

Symmetric quantizers leave half of the numbers unused after a Relu, and runtimes that drop a Relu in front of
QuantizeLinear do so only where the zero point is the smallest number. Scales stay, so that int32 biases fit;
integers are the same but where x was held at 127 s, up to 255 s of it now. Pooling, moving, joining, adding
and quantizing keep what is not negative so.
Declines: the integers are a graph's input or output, stored, or read by what may take no other type; zero
    points differ or are computed at run time; what stands in front of the Relu is read elsewhere too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_array, walk
from onnxopt.index import operator_of
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.chain import before, require_alone
from onnxopt.passes.shared.integers import Domain, domains_of
from onnxopt.passes.shared.quantized import DEQUANTIZE, QUANTIZE, carried, require_same
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope, scopes

__all__ = ["QuantizeRelu"]

_RULE = "values that are never negative"
_NEVER_NEGATIVE = ("Abs", "HardSigmoid", "Relu", "Sigmoid", "Softmax")
_KEEPS = ("AveragePool", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "Sqrt")
_KEEPS_BOTH = ("Add", "Mul", "Sum")


@dataclass(frozen=True)
class QuantizeRelu(Pass):
    """Quantize what follows a Relu to uint8 with zero point 0."""

    name: ClassVar[str] = "quantize-relu"
    kind: ClassVar[Kind] = "lossy"
    operators: ClassVar[tuple[str, ...]] = QUANTIZE
    example: ClassVar[str] = """
        agraph (float[N,2] x) => (float[N,2] y) <float s = {0.1}, int8 z = {0}>
        {
            r = Relu(x)
            q = QuantizeLinear(r, s, z)
            y = DequantizeLinear(q, s, z)
        }
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("rounded twice", ("Relu",), _rounded_twice),)

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        super().apply(model, ledger)
        for scope in scopes(model):
            known = _never_negative(scope.graph)
            for domain in domains_of(scope.graph):
                values = [node.inputs[0] for node, _ in domain.makers]
                if not values or any(value not in known for value in values):
                    continue
                try:
                    shift = _shift(domain)
                except Declined as reason:
                    ledger.decline(_RULE, domain.first.name or "", str(reason))
                    continue
                if shift is not None and ledger.claim(_RULE, domain.first.name or ""):
                    ledger.touch(domain.retype(ir.DataType.UINT8, shift, scope))


def _shift(domain: Domain) -> int | None:
    """What takes zero points from the middle of the type to 0; None where they are not there."""
    zeros = {int(one) for zero in domain.zero_points() for one in zero.reshape(-1)}
    middle = 0 if domain.dtype == ir.DataType.INT8 else 128
    if middle not in zeros:
        return None
    if len(zeros) > 1:
        raise Declined("zero points differ")
    if domain.stuck:
        raise Declined(f"quantized values are {domain.stuck}")
    if domain.constants or any(operator_of(node) not in QUANTIZE for node, _ in domain.makers):
        raise Declined("quantized values are stored, or made by a quantized operator")
    return -middle


def _never_negative(graph: ir.Graph) -> set[ir.Value]:
    """Values of which no element is below zero; of integers, below the zero point."""
    known: set[ir.Value | None] = set()
    for node in walk(graph):
        moves = carried(node)
        if node.op_type in _NEVER_NEGATIVE and not node.domain:
            known.add(node.outputs[0])
        elif node.op_type == "Clip" and not node.domain:
            low = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
            if node.inputs[0] in known or (low is not None and low.size == 1 and low.item() >= 0):
                known.add(node.outputs[0])
        elif moves is not None:
            if all(node.inputs[place] in known for place in moves[0]):
                known.update(moves[1])
        elif operator_of(node) in (*QUANTIZE, *DEQUANTIZE, *_KEEPS):
            known.update(node.outputs[:1] if node.inputs[0] in known else ())
        elif operator_of(node) in _KEEPS_BOTH and all(value in known for value in node.inputs):
            known.add(node.outputs[0])
    return {value for value in known if value is not None}


def _rounded_twice(node: ir.Node, scope: Scope) -> Edit | None:
    second = before(node.inputs[0], node, ("DequantizeLinear",))
    first = before(second.inputs[0], second, ("QuantizeLinear",)) if second is not None else None
    users = [use.node for use in node.outputs[0].uses()]
    if second is None or first is None or not users or any(operator_of(one) not in QUANTIZE for one in users):
        return None
    require_same(first, second)
    require_alone(second, node)
    require_alone(first, second)
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.op("Relu", (first.inputs[0],)))
