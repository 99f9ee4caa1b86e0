"""Fuse the parts of an activation function into the operator that stands for it.

Before: y = Mul(Mul(x, Add(Erf(Div(x, 1.4142135)), 1)), 0.5)
After:  y = Gelu(x)                                        opset 20
        y = com.microsoft.Gelu(x)                          with contrib, before opset 20

Likewise HardSigmoid, HardSwish (14), Swish (24; contrib QuickGelu), Gelu by tanh (20; contrib FastGelu), Mish
    (18), Softplus, Sigmoid, Softsign, LeakyRelu, Elu, Selu and Relu: a row each in the table below. Before
    opset 14 a HardSwish becomes x * HardSigmoid(x).
    Products and sums are found in any order and nesting. Numbers are compared to the rounding of their type.
Declines: the operator came with a later opset; a value inside is read elsewhere, or is a graph output; the
    type is none of float32 and float16, for which runtimes have the operators; log(1 + exp(x)), which is
    infinite where exp(x) is, and Softplus is not (`stable` allows it).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseActivation"]


@dataclass(frozen=True)
class _Row:
    """What the patterns become, from an opset on; `contrib` before that; `stable`: only if asked for."""

    opset: int
    result: str
    patterns: tuple[str, ...]
    contrib: str = ""
    stable: bool = False


_GATE = "HardSigmoid(x, alpha=0.16666666666666666, beta=0.5)"
_CLIP = "(Clip(Add(x, 3), 0, 6) | Clip(Add(x, 3), min=0, max=6))"
_LINE = "Add(Mul(x, 'a'), 'b')"
_ERF = "Erf(Mul(x, 0.7071067811865476))"
_CUBE = "(Mul(0.044715, x, x, x) | Mul(0.044715, Pow(x, 3)) | Mul(0.044715, x, Pow(x, 2)))"
_SQUARE = "(Mul(0.044715, x, x) | Mul(0.044715, Pow(x, 2)))"
_OTHER = "(Mul(0.035677408136300125, x, x, x) | Mul(0.035677408136300125, Pow(x, 3)))"
_TANH = f"""Tanh(Mul(0.7978845608028654, Add(x, {_CUBE})) | Add(Mul(0.7978845608028654, x), {_OTHER})
    | Mul(0.7978845608028654, x, Add({_SQUARE}, 1)))"""
_LOG = "Log(Add(Exp(x), 1))"
_POSITIVE = "(Greater(x, 0) | GreaterOrEqual(x, 0))"

_ROWS = (
    _Row(14, "HardSwish(x)", (f"Mul(x, {_GATE})", f"Mul(x, {_CLIP}, 0.16666666666666666)")),
    _Row(6, f"Mul(x, {_GATE})", (f"Mul(x, {_CLIP}, 0.16666666666666666)",)),
    _Row(6, _GATE, (f"Mul({_CLIP}, 0.16666666666666666)",)),
    _Row(6, "HardSigmoid(x, alpha=a, beta=b)", (f"Clip({_LINE}, 0, 1)", f"Clip({_LINE}, min=0, max=1)")),
    _Row(
        20,
        "Gelu(x)",
        (f"Mul(x, 0.5, Add({_ERF}, 1))", f"Mul(x, Add(Mul({_ERF}, 0.5), 0.5))"),
        "com_microsoft.Gelu(x)",
    ),
    _Row(
        20,
        "Gelu(x, approximate='tanh')",
        (
            f"Mul(x, 0.5, Add({_TANH}, 1))",
            f"Mul(x, Add(Mul({_TANH}, 0.5), 0.5))",
            f"Mul(x, Sigmoid(Mul(1.5957691216057308, Add(x, {_CUBE}))))",
        ),
        "com_microsoft.FastGelu(x)",
    ),
    _Row(18, "Mish(x)", ("Mul(x, Tanh(Softplus(x)))", f"Mul(x, Tanh({_LOG}))")),
    _Row(
        24,
        "Swish(x)",
        ("Mul(x, Sigmoid(x))", "Div(x, Add(Exp(Neg(x)), 1))"),
        "com_microsoft.QuickGelu(x, alpha=1.0)",
    ),
    _Row(
        24,
        "Swish(x, alpha=alpha)",
        ("Mul(x, Sigmoid(Mul(x, 'alpha')))",),
        "com_microsoft.QuickGelu(x, alpha=alpha)",
    ),
    _Row(6, "Sigmoid(x)", ("Div(1, Add(Exp(Neg(x)), 1))", "Reciprocal(Add(Exp(Neg(x)), 1))")),
    _Row(1, "Softplus(x)", ("Add(Relu(x) | Max(x, 0), Log(Add(Exp(Neg(Abs(x))), 1)))",)),
    _Row(1, "Softplus(x)", (_LOG,), stable=True),
    _Row(1, "Softsign(x)", ("Div(x, Add(Abs(x), 1))",)),
    _Row(
        6,
        "LeakyRelu(x, alpha=alpha)",
        (
            f"Where({_POSITIVE}, x, Mul(x, 'alpha'))",
            "Where(Less(x, 0) | LessOrEqual(x, 0), Mul(x, 'alpha'), x)",
            "PRelu(x, 'alpha')",
        ),
    ),
    _Row(6, "LeakyRelu(x, alpha=fraction)", ("Max(x, Mul(x, 'fraction'))",)),
    _Row(6, "Elu(x)", (f"Where({_POSITIVE}, x, Sub(Exp(x), 1))",)),
    _Row(6, "Elu(x, alpha=alpha)", (f"Where({_POSITIVE}, x, Mul(Sub(Exp(x), 1), 'alpha'))",)),
    _Row(6, "Selu(x)", ("Mul(Elu(x, alpha=1.6732632423543772), 1.0507009873554805)",)),
    _Row(6, "Relu(x)", ("Max(x, 0)",)),
)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Make one operator of the parts of an activation function.

    contrib: use operators of com.microsoft where the opset of the model has none. stable: also where the
    parts overflow to infinity and the operator does not.
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

    def rules(self) -> Sequence[Rule]:
        op_types = _all().op_types
        return (Rule("parts of an activation", op_types, self._fuse),)

    def _fuse(self, node: ir.Node, scope: Scope) -> Edit | None:
        known, others = _patterns(scope.opset, self.contrib, self.stable)
        match = known.find(node, scope)
        if match is None:
            missed = others.find(node, scope)
            if missed is not None:
                raise Declined(missed.name)
            return None
        if not _holds(match):
            return None
        edit = Edit(node, scope)
        return edit.replace(node.outputs[0], match.build(edit, match.name))


@functools.cache
def _all() -> Patterns:
    return Patterns({str(i): row.patterns for i, row in enumerate(_ROWS)})


@functools.cache
def _patterns(opset: int, contrib: bool, stable: bool) -> tuple[Patterns, Patterns]:
    """Patterns by what they become; those that become nothing, by the reason."""
    known, others = dict[str, list[str]](), dict[str, list[str]]()
    for row in _ROWS:
        if row.stable and not stable:
            reason = "the parts are infinite where they overflow, the operator is not (stable=true allows it)"
            others.setdefault(reason, []).extend(row.patterns)
        elif row.opset <= opset or (contrib and row.contrib):
            result = row.result if row.opset <= opset else row.contrib
            known.setdefault(result, []).extend(row.patterns)
        else:
            op_type = row.result.partition("(")[0]
            others.setdefault(f"{op_type} came with opset {row.opset}", []).extend(row.patterns)
    return Patterns(known), Patterns(others)


def _holds(match: Match) -> bool:
    """Whether the numbers are in range and the type is one that runtimes have the operator for.

    Raises:
        Declined: the type is another one.
    """
    if "fraction" in match.values and not 0 < match.number("fraction") <= 1:
        return False
    dtype = match["x"].dtype
    if dtype == ir.DataType.DOUBLE and match.name in ("Relu(x)", "Sigmoid(x)"):
        return True
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Declined("its type is unknown" if dtype is None else f"its type is {dtype.name}")
    return True
