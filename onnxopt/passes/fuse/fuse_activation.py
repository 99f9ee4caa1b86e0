"""Fuse the parts of an activation function into the operator that stands for it.

Before: y = Mul(Mul(x, Add(Erf(Div(x, 1.4142135)), 1)), 0.5)
After:  y = Gelu(x)                                        opset 20
        y = com.microsoft.Gelu(x)                          with contrib, before opset 20

Likewise HardSigmoid, HardSwish (14), Swish (24; contrib QuickGelu), Gelu by tanh (20; contrib FastGelu), Mish
    (18), Softplus, Sigmoid, Softsign, LeakyRelu, Elu, Selu, Relu: a row each in `shared/functions.py`. Before
    opset 14 a HardSwish becomes x * HardSigmoid(x).
    Products and sums are found in any order and nesting. Numbers are compared to the rounding of their type.
Declines: the operator came with a later opset; a value inside is read elsewhere, or is a graph output; the
    type is none of float32 and float16, for which runtimes have the operators; log(1 + exp(x)), which is
    infinite where exp(x) is, and Softplus is not (`stable` allows it); Swish (`swish` allows it).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.passes.shared.functions import PARTS, ROWS
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseActivation"]


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Make one operator of the parts of an activation function.

    contrib: use operators of com.microsoft where the opset of the model has none. stable: also where the
    parts overflow to infinity and the operator does not. swish: also Swish, which ONNX Runtime 1.31 takes
    apart again, to run twice as long as what it makes of the parts themselves.
    """

    name: ClassVar[str] = "fuse-activation"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 20]>
    agraph (float[2,3] x) => (float[2,3] y) {
        root = Constant<value_float = 1.4142135>()
        one = Constant<value_float = 1.0>()
        half = Constant<value_float = 0.5>()
        a = Div(x, root)
        b = Erf(a)
        c = Add(b, one)
        d = Mul(x, c)
        y = Mul(d, half)
    }"""

    contrib: bool = False
    stable: bool = False
    swish: bool = False

    def rules(self) -> Sequence[Rule]:
        op_types = _all().op_types
        return (Rule("parts of an activation", op_types, self._fuse),)

    def _fuse(self, node: ir.Node, scope: Scope) -> Edit | None:
        on = [name for name in _REASONS if getattr(self, name)]
        known, others = _patterns(scope.opset, self.contrib, frozenset(on))
        match = known.find(node, scope)
        if match is None:
            missed = others.find(node, scope)
            if missed is not None:
                op_type, _, opset = missed.name.partition(" ")
                raise NewerOpset(op_type, int(opset)) if opset.isdigit() else Declined(missed.name)
            return None
        if not _holds(match):
            return None
        edit = Edit(node, scope)
        return edit.replace(node.outputs[0], match.build(edit, match.name))


@functools.cache
def _all() -> Patterns:
    return Patterns({str(i): row.patterns for i, row in enumerate(ROWS)}, PARTS)


_REASONS = {
    "stable": "the parts are infinite where they overflow, the operator is not (stable=true allows it)",
    "swish": "Swish runs slower than its parts in ONNX Runtime 1.31 (swish=true allows it)",
}


@functools.cache
def _patterns(opset: int, contrib: bool, on: frozenset[str]) -> tuple[Patterns, Patterns]:
    """Patterns by what they become; those that become nothing, by the reason, or operator and opset."""
    known, others = dict[str, list[str]](), dict[str, list[str]]()
    for row in ROWS:
        wanted = not row.option or row.option in on
        if wanted and row.opset <= opset:
            known.setdefault(row.result, []).extend(row.patterns)
        elif contrib and row.contrib:
            known.setdefault(row.contrib, []).extend(row.patterns)
        else:
            late = f"{row.result.partition('(')[0]} {row.opset}"
            reason = late if row.opset > opset else _REASONS[row.option]
            others.setdefault(reason, []).extend(row.patterns)
    return Patterns(known, PARTS), Patterns(others, PARTS)


def _holds(match: Match) -> bool:
    """Whether the numbers are in range and the type is one that runtimes have the operator for.

    Raises:
        Declined: the type is another one, or the runtime's operator does not take a single number.
    """
    if "fraction" in match.values and not 0 < match.number("fraction") <= 1:
        return False
    dtype = match["x"].dtype
    if dtype == ir.DataType.DOUBLE and match.name in ("Relu(x)", "Sigmoid(x)"):
        return True
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Declined("its type is unknown" if dtype is None else f"its type is {dtype.name}")
    if "FastGelu" in match.name and not match["x"].shape:
        raise Declined("FastGelu takes no tensor without axes, and there may be none")
    return True
