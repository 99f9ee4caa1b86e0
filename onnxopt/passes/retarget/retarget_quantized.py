"""Give the integers of a quantized model the types that a target multiplies fast.

Before: q = QuantizeLinear(x, s, z); y = DequantizeLinear(q, s, z)      z, q: int8; activations=uint8
After:  q = QuantizeLinear(x, s, z + 128); y = DequantizeLinear(q, s, z + 128)      z, q: uint8

Before: MatMul(y, DequantizeLinear(w, s, z))                            z, w: uint8; weights=int8
After:  MatMul(y, DequantizeLinear(w - 128, s, z - 128))                z, w: int8

Before: Conv(y, w, DequantizeLinear(b, s))                              b: stored, int32; biases=float
After:  Conv(y, w, b s)

Likewise the operands of QLinearConv, QLinearMatMul, MatMulInteger and ONNX Runtime's own quantized operators;
all values that have to be of one type change together, whatever moves or joins them in between.
A stored operand is a weight where it is the second one of a product, else an activation.
Declines: a graph input or output, or a body's or function's, holds the integers; an operator makes or reads
    them that is not known to take another type (DynamicQuantizeLinear gives uint8 alone); a zero point is
    computed at run time; a stored operand is read as a weight and as an activation; with `symmetric`, the
    zero point would not be 0, so that only rounding anew would help; int8 activations would meet uint8
    weights in an operator that has no such kernel.
ONNX Runtime on x86 has no fast kernel for int8 activations, and multiplies uint8 activations by int8 weights
    twice as fast as by uint8 ones; but in ConvInteger six times more slowly, which therefore gets uint8.
    Without VNNI instructions those products saturate: there keep uint8 weights, or such of 7 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.errors import UsageError
from onnxopt.index import operator_of
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.integers import Domain, domains_of
from onnxopt.passes.shared.layer import LAYERS
from onnxopt.passes.shared.quantized import (
    DEQUANTIZE,
    QUANTIZED,
    carried,
    input_of,
    stored_floats,
)
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope, scopes

__all__ = ["RetargetQuantized"]

Type = Literal["int8", "uint8", "keep"]

_INT8, _UINT8 = ir.DataType.INT8, ir.DataType.UINT8
_RULE = "type of quantized values"
_JOINS = ("Concat", "Max", "Min", "Where")
_RECURRENT = ("GRU", "LSTM", "RNN")
_ORDER = (("weight", _INT8), ("activation", _UINT8), ("activation", _INT8), ("weight", _UINT8))
"""Types that go with both of the other operand come first, so that no product is left without a kernel."""


@dataclass(frozen=True)
class RetargetQuantized(Pass):
    """Change the types of quantized values where no number changes with them.

    activations, weights: "int8", "uint8" or "keep". symmetric: only to zero points 0, as TensorRT wants them.
    biases: "float" for targets that take no int32.
    """

    name: ClassVar[str] = "retarget-quantized"
    operators: ClassVar[tuple[str, ...]] = tuple(QUANTIZED)
    example: ClassVar[str] = """
        agraph (float[N,2] x) => (float[N,2] y)
        <float s = {0.1}, int8 z = {-3}, uint8[2,2] w = {1, 2, 254, 255}, uint8 m = {128}>
        {
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
            f = DequantizeLinear(w, s, m)
            y = MatMul(a, f)
        }
    """

    activations: Type = "uint8"
    weights: Type = "int8"
    symmetric: bool = False
    biases: Literal["float", "keep"] = "keep"

    def __post_init__(self) -> None:
        if (self.activations, self.weights) == ("int8", "uint8"):
            raise UsageError(f"{self.name}: no runtime multiplies int8 activations by uint8 weights")

    def rules(self) -> Sequence[Rule]:
        return (Rule("stored bias", DEQUANTIZE, _float_bias),) if self.biases == "float" else ()

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        super().apply(model, ledger)
        for scope in scopes(model):
            planned: list[tuple[int, Domain]] = []
            for domain in domains_of(scope.graph):
                wishes = {self._wanted(role): role for role in _roles(domain)}
                if len(wishes) > 1:
                    reason = "a stored operand is read as a weight and as an activation"
                    ledger.decline(_RULE, domain.first.name or "", reason)
                wanted, role = next(iter(wishes.items()), (None, ""))
                if len(wishes) == 1 and wanted is not None and (wanted != domain.dtype or self.symmetric):
                    planned.append((_ORDER.index((role.removeprefix("ConvInteger "), wanted)), domain))
            for place, domain in sorted(planned, key=lambda one: one[0]):
                self._retype(domain, _ORDER[place][1], scope, ledger)

    def _wanted(self, role: str) -> ir.DataType | None:
        wishes = {"activation": self.activations, "weight": self.weights, "ConvInteger weight": "uint8"}
        return {"int8": _INT8, "uint8": _UINT8}.get(wishes.get(role, "keep"))

    def _retype(self, domain: Domain, dtype: ir.DataType, scope: Scope, ledger: Ledger) -> None:
        site = domain.first.name or ""
        shift = 0 if domain.dtype == dtype else 128 if dtype == _UINT8 else -128
        try:
            zeros = domain.zero_points()
            if self.symmetric and any((zero + shift).any() for zero in zeros):
                raise Declined("the zero point would not be 0, which takes rounding anew")
            if not shift:
                return
            if domain.stuck:
                raise Declined(f"quantized values are {domain.stuck}")
            _require_kernels(domain, dtype)
            domain.require_range(dtype, shift)
        except Declined as reason:
            ledger.decline(_RULE, site, str(reason))
            return
        if ledger.claim(_RULE, site):
            ledger.touch(domain.retype(dtype, shift, scope))


def _roles(domain: Domain) -> list[str]:
    """What the values of a domain are to those that read them."""
    if domain.dynamic:
        return ["activation"]
    roles: dict[str, None] = {}
    for node, port in domain.readers:
        row = QUANTIZED.get(operator_of(node))
        if operator_of(node) in DEQUANTIZE:
            roles.update(_float_roles(node.outputs[0]))
        elif row is not None and row.weight is not None and port is row.inputs[row.weight]:
            roles["ConvInteger weight" if node.op_type == "ConvInteger" else "weight"] = None
        else:
            roles["activation"] = None
    return list(roles)


def _float_roles(value: ir.Value) -> dict[str, None]:
    """What a stored operand is after it is dequantized, wherever it is moved first."""
    roles: dict[str, None] = {}
    work, seen = [value], {value}
    while work:
        for use in work.pop().uses():
            moves = carried(use.node)
            if moves is not None and use.idx in moves[0] and use.node.op_type not in _JOINS:
                work.extend(one for one in moves[1] if one not in seen)
                seen.update(moves[1])
            elif use.node.op_type in LAYERS:
                roles["weight" if use.idx == 1 else "activation" if use.idx == 0 else "bias"] = None
            else:
                roles["recurrent weight" if use.node.op_type in _RECURRENT else "activation"] = None
    return roles


def _require_kernels(domain: Domain, dtype: ir.DataType) -> None:
    """Raise Declined where int8 activations would meet uint8 weights in one operator."""
    for node, port in domain.readers:
        row = QUANTIZED.get(operator_of(node))
        if row is None or row.weight is None or not row.float_op or len(row.inputs) < 2:
            continue
        weight = row.inputs[row.weight]
        other = input_of(node, (row.inputs[0] if port is weight else weight).data)
        bad = _INT8 if port is weight else _UINT8
        if dtype != bad and other not in domain.values and other is not None and other.dtype == bad:
            raise Declined("no operator multiplies int8 activations by uint8 weights")


def _float_bias(node: ir.Node, scope: Scope) -> Edit | None:
    value = node.inputs[0]
    if value is None or value.dtype != ir.DataType.INT32:
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.constant(stored_floats(node), value.name))
