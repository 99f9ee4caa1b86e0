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
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import int_attr, ints_attr, str_attr
from onnxopt.passes.shared.chain import before, normalised, rank_of, require_alone
from onnxopt.passes.shared.padding import ZERO, Pads, fill_array, fill_of, pads_of, require_constant_mode
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergePad"]


@dataclass(frozen=True)
class MergePad(Pass):
    """Let the next op do a Pad's padding."""

    name = "merge-pad"
    kind: ClassVar[Kind] = "reorder"
    example = """
agraph (float[1, 1, 4] x) => (float[1, 1, 4] y)
    <float[1, 1, 3] w = {1, 2, 3}, int64[6] pads = {0, 0, 1, 0, 0, 1}> {
    a = Pad(x, pads)
    y = Conv(a, w)
}
    """

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
    require_constant_mode(first)
    require_constant_mode(node)
    inner, outer = pads_of(first, scope.opset), pads_of(node, scope.opset)
    if fill_of(first, scope.opset) != fill_of(node, scope.opset):
        raise Declined("the two Pads fill with different values")
    if len({axis < 0 for axis in (*inner, *outer)}) > 1:
        rank = rank_of(first.inputs[0], *first.outputs, *node.outputs)
        inner, outer = _counted(inner, rank), _counted(outer, rank)
    pads = {axis: _sum(inner.get(axis, (0, 0)), outer.get(axis, (0, 0))) for axis in (*inner, *outer)}
    amounts = (*(begin for begin, _ in pads.values()), *(end for _, end in pads.values()))
    edit = Edit(node, scope)
    if scope.opset < 11:
        return edit.replace(node.outputs[0], edit.op("Pad", first.inputs, _with_pads(node, amounts)))
    inputs = [first.inputs[0], edit.constant(np.array(amounts, np.int64), "pads"), *first.inputs[2:3]]
    if any(len(pad.inputs) > 3 and pad.inputs[3] is not None for pad in (first, node)):
        inputs += [None] * (3 - len(inputs)) + [edit.constant(np.array(tuple(pads), np.int64), "axes")]
    return edit.replace(node.outputs[0], edit.op("Pad", inputs, node.attributes))


def _window(node: ir.Node, scope: Scope) -> Edit | None:
    pad = before(node.inputs[0], node, ("Pad",))
    if pad is None or scope.opset < 2:
        return None
    require_alone(pad, node)
    require_constant_mode(pad)
    auto = str_attr(node, "auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise Declined("auto_pad makes pads of its own")
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    kernel = ints_attr(node, "kernel_shape")
    rank = rank_of(weight, pad.inputs[0], *node.outputs) if kernel is None else len(kernel) + 2
    added = _spatial(pads_of(pad, scope.opset), rank)
    own = (ints_attr(node, "pads") if auto == "NOTSET" else None) or (0,) * len(added)
    if len(own) != len(added):
        raise Declined("Pad and the next op disagree on the number of axes")
    pads = _sum(added, own)
    fits = fill_of(pad, scope.opset) == ZERO
    if node.op_type != "Conv":
        _check_pool(node, kernel or (), pads)
    if node.op_type == "MaxPool":
        fits = _is_minus_infinity(fill_array(pad, scope.opset))
    if not fits:
        raise Declined("Pad does not fill with what the next op pads with")
    attributes = _with_pads(node, pads)
    if node.op_type == "AveragePool":
        if scope.opset < 7 or (any(own) and not int_attr(node, "count_include_pad", 0)):
            raise Declined("the pool does not count its own padding, but does count Pad's")
        attributes["count_include_pad"] = 1
    edit = Edit(node, scope)
    value = edit.op(node.op_type, (pad.inputs[0], *node.inputs[1:]), attributes)
    return edit.replace(node.outputs[0], value)


def _check_pool(node: ir.Node, kernel: tuple[int, ...], pads: tuple[int, ...]) -> None:
    """Raise Declined unless each window lies in what is padded, and holds something of the input."""
    if int_attr(node, "ceil_mode", 0) or set(ints_attr(node, "dilations") or ()) > {1}:
        raise Declined("a pool with ceil_mode or dilations")
    if len(node.outputs) > 1:
        raise Declined("a pool with indices, which count the padding")
    if any(amount >= size for amount, size in zip(pads, kernel * 2, strict=True)):
        raise Declined("pads as large as the pool's window")


def _is_minus_infinity(fill: np.ndarray | None) -> bool:
    return fill is not None and fill.dtype.kind == "f" and bool(np.isneginf(fill).all())


def _with_pads(node: ir.Node, pads: tuple[int, ...]) -> dict[str, AttributeValue]:
    """The node's attributes with these explicit pads."""
    kept = {name: attr for name, attr in node.attributes.items() if name != "auto_pad"}
    return {**kept, "pads": pads}


def _counted(pads: Pads, rank: int | None) -> Pads:
    """The pads by axes counted from the front."""
    return dict(zip(normalised(tuple(pads), rank), pads.values(), strict=True))


def _spatial(pads: Pads, rank: int | None) -> tuple[int, ...]:
    """The pads in front of each axis but batch and channels, then those behind, as Conv spells them."""
    if rank is None:
        raise Declined("the number of axes is unknown")
    counted = _counted(pads, rank)
    every = [counted.get(axis, (0, 0)) for axis in range(rank)]
    if any(map(any, every[:2])):
        raise Declined("Pad widens the batch or the channels")
    return (*(begin for begin, _ in every[2:]), *(end for _, end in every[2:]))


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
