"""A scale and a shift per channel, carried across nodes that only move, join or pool values.

    scale * Transpose(x) + shift = Transpose(scale * x + shift), the channels on another axis
    scale * MaxPool(x) + shift   = MaxPool(scale * x + shift), if scale > 0
    scale * Concat(x, y) + shift = Concat(scale' * x + shift', scale" * y + shift"), each its part

so that a layer can take them which is not beside the arithmetic. Axes are counted from the front; None stands
for a scale and a shift that are the same for all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import FLOATS, has_reference, int_attr, sole_user
from onnxopt.passes.shared.affine import Place, outputs_scaled
from onnxopt.passes.shared.axes import across, joined_axis, passed, require_passage, sections_of
from onnxopt.passes.shared.chain import normalised, rank_of
from onnxopt.passes.shared.layer import Layer, constant, is_stored, layer_of
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope
from onnxopt.streamed import LARGE, is_on_disk, mapped

__all__ = ["carried_down", "comes_from_layers", "scaled_above", "sources"]

Plan = Callable[[Edit, np.ndarray, np.ndarray], ir.Value]
"""Builds, in an edit, scale * value + shift for a value it was made for."""

_FAR = 8
"""Nodes in a row that are looked past."""


def comes_from_layers(value: ir.Value, user: ir.Node) -> bool:
    """Whether `user` alone reads what layers with stored weights give, moved, joined or pooled."""
    node = value.producer()
    return node is not None and layer_of(node) is None and _from_layers(value, user, _FAR)


def _from_layers(value: ir.Value, user: ir.Node, far: int) -> bool:
    node = value.producer()
    if node is None or not far or sole_user(value) is not user:
        return False
    layer = layer_of(node)
    if layer is not None:
        return layer.stored
    if node.op_type == "Gather" and not node.domain and not has_reference(node):
        return is_stored(node.inputs[0]) and node.inputs[0] is not None and node.inputs[0].dtype in FLOATS
    inner = passed(node)
    return bool(inner) and all(v is not None and _from_layers(v, node, far - 1) for v in inner)


def scaled_above(value: ir.Value, axis: int | None, scope: Scope) -> Plan:
    """How to scale and shift, along `axis`, a value that comes from layers, in those layers.

    Raises (as does the plan):
        Declined: a layer cannot take them, or a node in between does not let them pass.
    """
    node = value.producer()
    assert node is not None
    layer = layer_of(node)
    if layer is not None:
        return _in_layer(layer, axis, scope)
    if node.op_type == "Gather":
        return _in_table(node, axis)
    if node.op_type == "Concat":
        return _in_parts(node, axis, scope)
    source = node.inputs[0]
    assert source is not None
    inner_axis, spread = across(node, axis, up=True)
    inner = scaled_above(source, inner_axis, scope)

    def build(edit: Edit, scale: np.ndarray, shift: np.ndarray) -> ir.Value:
        require_passage(node, axis, scale, shift, scope)
        return _redone(edit, node, inner(edit, spread(scale), spread(shift)))

    return build


def _in_layer(layer: Layer, axis: int | None, scope: Scope) -> Plan:
    if axis not in (None, layer.axis):
        raise Declined("the constant does not run along the channels of the layer")

    def build(edit: Edit, scale: np.ndarray, shift: np.ndarray) -> ir.Value:
        if shift.any() and layer.end.op_type == "MatMul" and layer.rank != 2:
            raise Declined("the MatMul has no bias that could take the shift")
        return outputs_scaled(layer, scale, shift, edit, scope)

    return build


def _in_table(node: ir.Node, axis: int | None) -> Plan:
    table, indices = node.inputs
    tensor, rank = constant(table, "table"), rank_of(*node.outputs)
    looked_up = normalised((int_attr(node, "axis", 0),), len(tensor.shape))[0]
    place = len(tensor.shape) - (rank - axis) if axis is not None and rank is not None else None
    if axis is not None and (place is None or place <= looked_up):
        raise Declined("the constant does not run along the entries of the table")
    if table is None or (tensor.nbytes > LARGE and len(table.uses()) > 1):
        raise Declined("the table is shared and too large to duplicate")

    def build(edit: Edit, scale: np.ndarray, shift: np.ndarray) -> ir.Value:
        ends = (1,) * (len(tensor.shape) - 1 - place) if place is not None else ()
        shape = () if place is None else (-1, *ends)
        factors = [ir.Tensor(vector.reshape(shape)) for vector in (scale, shift)]
        product = mapped(_times_plus, (tensor, *factors), tensor.dtype)
        scaled = product if is_on_disk(tensor) else rounded(product.numpy(), tensor.dtype)
        entries = edit.constant(scaled, table.name)
        return edit.op("Gather", (entries, indices), node.attributes, name=node.name or "")

    return build


def _times_plus(entries: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """In float64, rounded once to the type of the entries."""
    with np.errstate(over="ignore"):
        result: np.ndarray = (entries * scale + shift).astype(entries.dtype)
        return result


def _in_parts(node: ir.Node, axis: int | None, scope: Scope) -> Plan:
    sections = sections_of(node) if axis is not None and axis == joined_axis(node) else None
    plans = [scaled_above(value, axis, scope) for value in node.inputs if value is not None]

    def build(edit: Edit, scale: np.ndarray, shift: np.ndarray) -> ir.Value:
        parts = [slice(None)] * len(plans) if sections is None else sections
        values = [
            plan(edit, *(v[part] if v.size > 1 else v for v in (scale, shift)))
            for plan, part in zip(plans, parts, strict=True)
        ]
        return edit.op("Concat", values, node.attributes, name=node.name or "")

    return build


def sources(value: ir.Value, user: ir.Node) -> Iterator[tuple[ir.Node, tuple[Place, ...]]]:
    """The nodes whose values reach `user`, who alone reads `value`, past some others; and the way down."""
    work: list[tuple[ir.Value, ir.Node, tuple[Place, ...]]] = [(value, user, ())]
    while work:
        value, user, way = work.pop()
        node = value.producer()
        if node is None or sole_user(value) is not user:
            continue
        inputs = passed(node) if len(way) < _FAR else ()
        if not inputs and way:
            yield node, way
        for place, inner in reversed(list(enumerate(inputs))):
            if inner is not None:
                work.append((inner, node, ((node, place), *way)))


def carried_down(
    way: Sequence[Place], axis: int | None, scale: np.ndarray, shift: np.ndarray, scope: Scope
) -> tuple[int | None, np.ndarray, np.ndarray]:
    """Along which axis what is scaled and shifted at the start of the way is so at its end, and how much.

    Raises:
        Declined: a node does not let them pass.
    """
    for node, place in way:
        if node.op_type == "Concat":
            joined, sections = joined_axis(node), sections_of(node)
            if axis not in (None, joined):
                raise Declined("what is joined with it along another axis is not scaled")
            size = sections[-1].stop
            full = np.ones(size), np.zeros(size)
            full[0][sections[place]], full[1][sections[place]] = scale, shift
            axis, (scale, shift) = joined, full
            continue
        require_passage(node, axis, scale, shift, scope)
        axis, spread = across(node, axis, up=False)
        scale, shift = spread(scale), spread(shift)
    return axis, scale, shift


def _redone(edit: Edit, node: ir.Node, value: ir.Value) -> ir.Value:
    return edit.op(node.op_type, (value, *node.inputs[1:]), node.attributes, name=node.name or "")
