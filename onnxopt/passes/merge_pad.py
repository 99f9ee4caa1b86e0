"""Merge a Pad into the Pad, Conv or pool that reads it.

Before: z = Pad(Pad(x, p, value), q, value)
After:  z = Pad(x, p + q, value)
Before: z = Conv[pads=q](Pad(x, p, 0)); AveragePool, where it counts the padding or has none; MaxPool of -inf
After:  z = Conv[pads=p+q](x), AveragePool[pads=p+q, count_include_pad=1](x), MaxPool[pads=p+q](x)
Declines: other modes than constant; pads, value or axes that are no constant; pads that crop; pads of the
    batch or channels; values that are not what the next op pads with; auto_pad SAME; pads as large as a
    pool's window; ceil_mode, dilated pools and MaxPool's indices; the padded value is read elsewhere too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, float_attr, int_attr, ints_attr, str_attr
from onnxopt.passes._chain import axes_of, before, constant_ints, normalised, rank_of, require_alone
from onnxopt.pipeline import Kind, Pass
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule, Scope

__all__ = ["MergePad"]

_Pads = dict[int, tuple[int, int]]
"""Axis, as it is spelt -> elements put in front and behind."""


@dataclass(frozen=True)
class MergePad(Pass):
    """Let the next op do a Pad's padding."""

    name = "merge-pad"
    kind: Kind = "reorder"

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("Pad after Pad", ("Pad",), _pad),
            Rule("Conv or pool after Pad", ("Conv", "AveragePool", "MaxPool"), _window),
        )


def _pad(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Pad",))
    if first is None or scope.opset < 2:
        return None
    require_alone(first, node)
    if _mode(first) != "constant" or _mode(node) != "constant":
        raise Declined("a Pad of another mode than constant")
    if _fill(first, scope) != _fill(node, scope):
        raise Declined("the two Pads fill with different values")
    inner, outer = _pads(first, scope), _pads(node, scope)
    rank = rank_of(*first.inputs[:1], *first.outputs, *node.outputs)
    if len({axis < 0 for axis in (*inner, *outer)}) > 1:
        inner, outer = (
            dict(zip(normalised(tuple(p), rank), p.values(), strict=True)) for p in (inner, outer)
        )
    pads = {axis: _sum(inner.get(axis, (0, 0)), outer.get(axis, (0, 0))) for axis in (*inner, *outer)}
    begins, ends = zip(*pads.values(), strict=True) if pads else ((), ())
    edit, amounts = Edit(node, scope), (*begins, *ends)
    if scope.opset < 11:
        attributes = {**node.attributes, "pads": amounts}
        return edit.replace(node.outputs[0], edit.op("Pad", first.inputs, attributes))
    inputs = [first.inputs[0], edit.constant(np.array(amounts, np.int64), "pads"), *first.inputs[2:3]]
    if any(len(pad.inputs) > 3 and pad.inputs[3] is not None for pad in (first, node)):
        inputs += [None] * (3 - len(inputs)) + [edit.constant(np.array(tuple(pads), np.int64), "axes")]
    return edit.replace(node.outputs[0], edit.op("Pad", inputs, {"mode": "constant"}))


def _window(node: ir.Node, scope: Scope) -> Edit | None:
    pad = before(node.inputs[0], node, ("Pad",))
    if pad is None or scope.opset < 2:
        return None
    require_alone(pad, node)
    if _mode(pad) != "constant":
        raise Declined("a Pad of another mode than constant")
    auto = str_attr(node, "auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise Declined("auto_pad makes pads of its own")
    kernel, weight = ints_attr(node, "kernel_shape"), node.inputs[1] if len(node.inputs) > 1 else None
    rank = rank_of(weight, pad.inputs[0], *node.outputs) if kernel is None else len(kernel) + 2
    begins, ends = _spatial(_pads(pad, scope), rank)
    own = ints_attr(node, "pads") if auto == "NOTSET" else None
    own = own or (0,) * (2 * len(begins))
    if len(own) != 2 * len(begins):
        raise Declined("Pad and the next op disagree on the number of axes")
    pads = _sum((*begins, *ends), own)
    attributes: dict[str, AttributeValue] = {k: v for k, v in node.attributes.items() if k != "auto_pad"}
    attributes["pads"] = pads
    if node.op_type == "Conv":
        if _fill(pad, scope) != b"":
            raise Declined("Pad does not fill with what the next op pads with")
    else:
        _check_pool(node, pad, scope, kernel or (), pads, own)
        if node.op_type == "AveragePool":
            attributes["count_include_pad"] = 1
    edit = Edit(node, scope)
    value = edit.op(node.op_type, (pad.inputs[0], *node.inputs[1:]), attributes)
    return edit.replace(node.outputs[0], value)


def _check_pool(
    node: ir.Node,
    pad: ir.Node,
    scope: Scope,
    kernel: tuple[int, ...],
    pads: tuple[int, ...],
    own: tuple[int, ...],
) -> None:
    """Raise Declined unless each window sees the same as before, and something of the input."""
    if (
        int_attr(node, "ceil_mode", 0)
        or set(ints_attr(node, "dilations") or ()) > {1}
        or len(node.outputs) > 1
    ):
        raise Declined("a pool with ceil_mode, dilations or indices")
    if any(amount >= size for amount, size in zip(pads, kernel * 2, strict=True)):
        raise Declined("pads as large as the pool's window")
    if node.op_type == "AveragePool":
        if scope.opset < 7 or not int_attr(node, "count_include_pad", 0) and any(own):
            raise Declined("the pool does not count its own padding, but does count Pad's")
        if _fill(pad, scope) != b"":
            raise Declined("Pad does not fill with what the next op pads with")
    elif not _fills_with_minus_infinity(pad, scope):
        raise Declined("Pad does not fill with what the next op pads with")


def _fills_with_minus_infinity(pad: ir.Node, scope: Scope) -> bool:
    if scope.opset < 11:
        return float_attr(pad, "value", 0.0) == -np.inf
    array = constant_array(pad.inputs[2]) if len(pad.inputs) > 2 else None
    return array is not None and array.dtype.kind == "f" and bool(np.isneginf(array).all())


def _mode(pad: ir.Node) -> str:
    return str_attr(pad, "mode", "constant")


def _fill(pad: ir.Node, scope: Scope) -> bytes | ir.Value:
    """The bytes of the value that is put in, empty where it is zero; or the value, if it is no constant."""
    if scope.opset < 11:
        return _bits(np.array(float_attr(pad, "value", 0.0), np.float32))
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    array = constant_array(value)
    return b"" if value is None else value if array is None else _bits(array)


def _bits(array: np.ndarray) -> bytes:
    data = array.tobytes()
    return data if any(data) else b""


def _pads(pad: ir.Node, scope: Scope) -> _Pads:
    """What a Pad puts in, by axis; Declined where it crops."""
    if scope.opset < 11:
        amounts, axes = ints_attr(pad, "pads") or (), None
    else:
        amounts, axes = constant_ints(pad.inputs[1], "the pads are"), axes_of(pad, 3)
    count = len(amounts) // 2
    axes = tuple(range(count)) if axes is None else axes
    if len(amounts) != 2 * len(axes) or len(set(axes)) < count or min(amounts, default=0) < 0:
        raise Declined("pads that crop, or do not fit the axes")
    return {axis: (amounts[place], amounts[place + count]) for place, axis in enumerate(axes)}


def _spatial(pads: _Pads, rank: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pads in front and behind of each axis but the batch and the channels, of which there must be none."""
    if rank is None:
        raise Declined("the number of axes is unknown")
    counted = dict(zip(normalised(tuple(pads), rank), pads.values(), strict=True))
    every = [counted.get(axis, (0, 0)) for axis in range(rank)]
    if any(map(any, every[:2])):
        raise Declined("Pad widens the batch or the channels")
    return tuple(begin for begin, _ in every[2:]), tuple(end for _, end in every[2:])


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
