"""Remove what one op does and the next does again, undoes, or could take over by its sign.

Before: y = Neg(Neg(x)); z = Floor(Ceil(y)); w = Where(Not(c), z, y); v = Add(w, Neg(u))
After:  z = Ceil(x); w = Where(c, x, z); v = Sub(w, u)
Declines: the value in between is read elsewhere too, or is a graph output. Left alone: Div(Neg(x), Neg(y))
    of other types than floating point, since the least integer by -1 is a fault of the processor.

All are bit-equal for every number, NaN, the infinities and both zeros included, and for integers that
wrap around. A Sum of two is an Add, which more kernels and quantizers know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import FLOATS, has_reference
from onnxopt.pattern import Patterns
from onnxopt.rewrite import Edit, Rule
from onnxopt.scope import Scope

__all__ = ["EliminatePairs"]

_WHOLE = ("Ceil", "Floor", "Round")
_REPEATS = {
    "Abs": ("Abs",),
    "Ceil": _WHOLE,
    "Floor": _WHOLE,
    "Relu": ("Relu",),
    "Round": _WHOLE,
    "Sign": ("Sign",),
}
"""What leaves the result of which op as it is."""

_SAME_TWICE = ("And", "Max", "Min", "Or")

_REPLACED = {
    "Neg(Neg(x))": "x",
    "Not(Not(x))": "x",
    "Abs(Neg(x))": "Abs(x)",
    "Where(Not(c), x, y)": "Where(c, y, x)",
    "Add(x, Neg(y))": "Sub(x, y)",
    "Sub(x, Neg(y))": "Add(x, y)",
    "Mul(Neg(x), Neg(y))": "Mul(x, y)",
    "Div(Neg(x), Neg(y))": "Div(x, y)",
    "Sum(x, y)": "Add(x, y)",
}
_PATTERNS = Patterns({after: [b for b, a in _REPLACED.items() if a == after] for after in _REPLACED.values()})


@dataclass(frozen=True)
class EliminatePairs(Pass):
    """Let one op do what two in a row do."""

    name = "eliminate-pairs"
    example = """agraph (float[N] x, float[N] u) => (float[N] v) {
        a = Neg(x)
        b = Neg(a)
        c = Ceil(b)
        d = Floor(c)
        e = Neg(u)
        v = Add(d, e)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("done before", tuple(_REPEATS), _repeats),
            Rule("two equal operands", _SAME_TWICE, _same_twice),
            Rule("a pair", _PATTERNS.op_types, _replace),
        )


def _repeats(node: ir.Node, scope: Scope) -> Edit | None:
    value = node.inputs[0]
    first = value.producer() if value is not None else None
    if value is None or first is None or first.domain or first.op_type not in _REPEATS[node.op_type]:
        return None
    return Edit(node, scope).replace(node.outputs[0], value)


def _same_twice(node: ir.Node, scope: Scope) -> Edit | None:
    if scope.opset < 7 or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return None
    assert node.inputs[0] is not None
    return Edit(node, scope).replace(node.outputs[0], node.inputs[0])


def _replace(node: ir.Node, scope: Scope) -> Edit | None:
    match = None if has_reference(node) else _PATTERNS.find(node, scope)
    if match is None or (node.op_type == "Sum" and scope.opset < 8):
        return None
    if match.name == "Div(x, y)" and match["x"].dtype not in FLOATS:
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], match.build(edit, match.name))
