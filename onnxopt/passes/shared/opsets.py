"""A node on its way to a newer opset.

An operator that no table knows is the same under the new opset if it only grew: attributes with a default,
optional inputs and outputs, more types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.rewrite import AttributeValue, Declined

__all__ = ["Adapter", "Form", "raised"]


@dataclass
class Form:
    """A node on its way to opset `version`; the graph does not change with it.

    flatten: the axis from which on the input has to be made flat for the operator, and put back after it.
    """

    node: ir.Node
    version: int
    op_type: str
    inputs: list[ir.Value | np.ndarray | None]
    attributes: dict[str, ir.Attr]
    flatten: int | None = None
    changed: bool = False

    def take(self, name: str) -> ir.Attr | None:
        """Remove an attribute; raises `Declined` where the caller of a function gives its value."""
        attr = self.attributes.pop(name, None)
        if attr is not None and attr.is_ref():
            raise Declined("an attribute that becomes an input refers to one of the enclosing function")
        self.changed |= attr is not None
        return attr

    def give(self, name: str, value: AttributeValue) -> None:
        """Set an attribute."""
        self.attributes[name] = ir.convenience.convert_attribute(name, value)
        self.changed = True

    def put(self, position: int, value: np.ndarray | None) -> None:
        """Set an input; None leaves it out."""
        if value is None:
            return
        self.inputs += [None] * (position + 1 - len(self.inputs))
        self.inputs[position] = value
        self.changed = True

    def rename(self, op_type: str) -> None:
        """Make it another operator."""
        self.op_type, self.changed = op_type, True

    def decline_if(self, wrong: bool, reason: str) -> None:
        """Raise `Declined` where something holds that the newer operator cannot say."""
        if wrong:
            raise Declined(f"{self.node.op_type}: {reason}")


Adapter = Callable[[Form], None]


def raised(node: ir.Node, old: int, new: int, table: Mapping[tuple[str, int], Adapter]) -> Form:
    """A node of opset `old` in its form of opset `new`.

    table: operator and the opset that changed it -> how a node keeps its meaning.

    Raises:
        Declined: it has none, or it is not known to have the same meaning.
    """
    if not onnx.defs.has(node.op_type, old):
        raise Declined(f"{node.op_type} is no operator of opset {old}")
    form = Form(node, new, node.op_type, list(node.inputs), dict(node.attributes))
    for version in range(old + 1, new + 1):
        adapter = table.get((form.op_type, version))
        if adapter is not None:
            adapter(form)
        elif not _only_grew(form.op_type, version):
            raise Declined(f"{form.op_type} has another form from opset {version} on")
    lost = _lost_types(form.op_type, old, new) if form.op_type == node.op_type else {}
    for value, types in zip(node.inputs, lost.values(), strict=False):
        kind = None if value is None or value.dtype is None else f"tensor({value.dtype.name.lower()})"
        form.decline_if(kind in types, f"it takes no {kind} under opset {new}")
    return form


@functools.cache
def _only_grew(op_type: str, version: int) -> bool:
    """Whether the operator, as of this opset, takes all that it took one before, in the same meaning."""
    old, new = (onnx.defs.get_schema(op_type, number) for number in (version - 1, version))
    if old.since_version == new.since_version:
        return True
    if new.deprecated or len(old.inputs) > len(new.inputs) or len(old.outputs) != len(new.outputs):
        return False
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    ports = zip((*old.inputs, *old.outputs), (*new.inputs[: len(old.inputs)], *new.outputs), strict=True)
    if any(before.option != after.option and after.option != optional for before, after in ports):
        return False
    if any(port.option != optional for port in new.inputs[len(old.inputs) :]):
        return False
    for name, attr in new.attributes.items():
        before = old.attributes.get(name)
        if attr.required and (before is None or not before.required):
            return False
        if before is not None and (before.type, _default(before)) != (attr.type, _default(attr)):
            return False
    return old.attributes.keys() <= new.attributes.keys()


def _default(attr: onnx.defs.OpSchema.Attribute) -> bytes:
    return bytes(attr.default_value.SerializeToString(deterministic=True))


@functools.cache
def _lost_types(op_type: str, old: int, new: int) -> dict[str, set[str]]:
    """For each input, the types that it takes no more."""
    before, after = (onnx.defs.get_schema(op_type, version).inputs for version in (old, new))
    return {a.name: set(a.types) - set(b.types) for a, b in zip(before, after, strict=False)}
