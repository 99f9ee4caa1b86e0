"""Fuse the parts of Softmax and LogSoftmax.

Before: e = Exp(Sub(x, ReduceMax(x, axes=[a]))); y = Div(e, ReduceSum(e, axes=[a]))
After:  y = Softmax(x, axis=a)

Before: d = Sub(x, ReduceMax(x, axes=[a])); y = Sub(d, Log(ReduceSum(Exp(d), axes=[a])))
After:  y = LogSoftmax(x, axis=a)

The reductions may drop the axis, if a Reshape or Unsqueeze puts it back.
Declines: more than one axis, or not the last one before opset 13; the type is an integer or bfloat16; a value
    inside is read elsewhere; without the maximum, and Log(Softmax(x)), where the parts are infinite or not a
    number and the operators are not (`stable` allows it).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.passes.shared.reduction import common_axes, kept
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseSoftmax"]

_SUM = "ReduceSum(Exp({}), ...)"
_LOGARITHM = f"(total := {kept(f'Log({_SUM})')}) | Log((total := {kept(_SUM)}))"
_PARTS = {
    "Top": "ReduceMax(x, ...) | Max(ReduceMax(x, ...), 'low')",
    "Shifted": f"Sub(x, (top := {kept('Top')}))",
    "Total": f"(total := {kept('ReduceSum(e, ...)')})",
    "Inverse": "Reciprocal(Total) | Div(1, Total)",
}
_PATTERNS = {
    "Softmax": ("Div((e := Exp(Shifted)), Total)", "Mul((e := Exp(Shifted)), Inverse)"),
    "LogSoftmax": (
        f"Sub((d := Shifted), {_LOGARITHM.replace('{}', 'd')})",
        f"Sub(x, (total := {kept('ReduceLogSumExp(x, ...)')}))",
    ),
}
_UNSTABLE = {
    "Softmax": ("Div((e := Exp(x)), Total)", "Mul((e := Exp(x)), Inverse)"),
    "LogSoftmax": ("Log((softmax := Softmax(x)))", f"Sub(x, {_LOGARITHM.replace('{}', 'x')})"),
}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class FuseSoftmax(Pass):
    """Make one operator of the parts of Softmax or LogSoftmax.

    stable: also where the parts overflow to infinity, or give no number, and the operator does not.
    """

    name: ClassVar[str] = "fuse-softmax"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[N,8] x) => (float[N,8] y) {
        last = Constant<value_ints = [-1]>()
        top = ReduceMax<axes = [-1]>(x)
        shifted = Sub(x, top)
        powers = Exp(shifted)
        total = ReduceSum(powers, last)
        y = Div(powers, total)
    }"""

    stable: bool = False

    def rules(self) -> Sequence[Rule]:
        op_types = dict.fromkeys((*_patterns(False).op_types, *_patterns(True).op_types))
        return (Rule("parts of Softmax", tuple(op_types), self._fuse),)

    def _fuse(self, node: ir.Node, scope: Scope) -> Edit | None:
        match = _patterns(False).find(node, scope)
        if match is None:
            match = _patterns(True).find(node, scope)
            if match is not None and not self.stable:
                raise Declined("where the parts overflow, the operator does not (stable=true allows it)")
        if match is None or ("low" in match.values and match.number("low") != -math.inf):
            return None
        edit = Edit(node, scope)
        output = edit.op(match.name, (match["x"],), _attributes(match, scope))
        return edit.replace(node.outputs[0], output)


@functools.cache
def _patterns(unstable: bool) -> Patterns:
    return Patterns(_UNSTABLE if unstable else _PATTERNS, _PARTS)


def _attributes(match: Match, scope: Scope) -> Mapping[str, AttributeValue]:
    x = match["x"]
    if x.dtype not in _FLOATS:
        raise Declined("its type is unknown" if x.dtype is None else f"its type is {x.dtype.name}")
    if "softmax" in match.values:
        return match.node("softmax").attributes
    axes = common_axes(match, x, (match.get("top"), match["total"]))
    assert x.shape is not None
    if len(axes) > 1 or (scope.opset < 13 and axes[0] != len(x.shape) - 1):
        raise Declined("it is along more than one axis, or not the last one before opset 13")
    return {"axis": axes[0]}
