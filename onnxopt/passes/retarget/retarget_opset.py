"""Raise the opset of the model, and the IR version with it; each operator keeps its meaning.

Before: opset 11; y = Squeeze[axes=[1]](x); z = Softmax[axis=1](t), with t of rank 3
After:  opset 23; y = Squeeze(x, [1]); z = Reshape(Softmax[axis=-1](Flatten[axis=1](t)), Shape(t))
Declines: an operator of the model cannot be said, or is not known to be the same, in the new opset; the
    model, or a function of it, is below opset 7 or above `version`; ONNX Runtime has no kernel for it
    there. The model is then left as it is: there is no half of it to raise.

Operators of other domains stay untouched, weights are not read, and nodes keep their names. Below IR version
4 the IR version stays: above it, initializers that are graph inputs could be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import nodes, roots, walk
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.shared.opset_changes import CHANGES, REVIEWED
from onnxopt.passes.shared.opsets import Form, raised
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope, scopes

__all__ = ["RetargetOpset"]

_OLDEST = 7
"""Below it, broadcasting was an attribute, and the runtime has no kernels."""

_WITHOUT_KERNEL = frozenset({"RandomNormalLike", "RandomUniform", "RandomUniformLike", "RoiAlign"})
"""Operators for whose form of opset 22 ONNX Runtime has no kernel, up to version 1.31."""

_IR_VERSIONS: Mapping[int, int] = {
    7: 3,
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    15: 8,
    19: 9,
    21: 10,
    23: 11,
    24: 12,
    25: 13,
}
"""Opset -> the IR version that was released with it."""


@dataclass(frozen=True)
class RetargetOpset(Pass):
    """Bring every operator of ONNX's own domain into its form of a newer opset.

    version: that opset. From 17 on there is LayerNormalization, from 20 Gelu, from 23 RMSNormalization,
        Attention and RotaryEmbedding.
    on_demand: go only as far as another pass has asked for, which declined for want of an operator.
    """

    name = "retarget-opset"
    kind = "reorder"
    example: ClassVar[str] = """
        <ir_version: 7, opset_import: ["" : 11]>
        agraph (float[2, 3, 4] x) => (float[2, 4] y) {
            s = Softmax(x)
            y = ReduceSum<axes = [1], keepdims = 0>(s)
        }
    """

    version: int = 23
    on_demand: bool = False

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        opsets = {root: root.opset_imports.get("") for root in roots(model)}
        if self.on_demand:
            now = max(filter(None, opsets.values()), default=0)
            wanted = max((opset for opset in ledger.opsets_wanted if opset <= self.version), default=0)
            if wanted > now:
                RetargetOpset(wanted).apply(model, ledger)
            return
        if all(opset in (None, self.version) for opset in opsets.values()):
            return
        rule = f"to opset {self.version}"
        forms = self._forms(model, rule, ledger)
        if forms is None or not ledger.claim(rule, ""):
            return
        for root, opset in opsets.items():
            if opset is not None:
                root.opset_imports[""] = self.version
        if model.ir_version >= 4:
            needed = max(ir_version for opset, ir_version in _IR_VERSIONS.items() if opset <= self.version)
            model.ir_version = max(model.ir_version, needed)
        for scope, form in forms:
            if form.changed and form.flatten is None and form.node.graph is not None:
                _set(form, scope)
        for scope, form in forms:
            if form.flatten is not None and form.node.graph is not None:
                _set_flat(form, scope)  # last: it gives the readers another value
        ledger.touch(nodes(model))

    def _forms(self, model: ir.Model, rule: str, ledger: Ledger) -> list[tuple[Scope, Form]] | None:
        """The new form of each node; None where one has none."""
        forms: list[tuple[Scope, Form]] = []
        whole = True
        for scope in scopes(model):
            for node in walk(scope.graph):
                if node.domain or node.op_identifier() in model.functions:
                    continue
                try:
                    forms.append((scope, self._raise(node, scope.opset)))
                except Declined as reason:
                    ledger.decline(rule, site_of(node), str(reason))
                    whole = False
        return forms if whole else None

    def _raise(self, node: ir.Node, opset: int) -> Form:
        if opset > self.version:
            raise Declined(f"it is of opset {opset}, which is newer")
        if opset < _OLDEST or self.version > REVIEWED:
            raise Declined(f"only opsets {_OLDEST} to {REVIEWED} are known")
        if node.op_type in _WITHOUT_KERNEL and opset < 22 <= self.version:
            raise Declined("ONNX Runtime has no kernel for it from opset 22 on")
        return raised(node, opset, self.version, CHANGES)


def _set(form: Form, scope: Scope) -> None:
    """Give a node its new form, in place."""
    node, edit = form.node, Edit(form.node, scope)
    like = node.outputs[0].name or node.op_type
    inputs = [
        edit.constant(value, f"{like}_{index}") if isinstance(value, np.ndarray) else value
        for index, value in enumerate(form.inputs)
    ]
    edit.commit()
    if node.graph is None:
        return  # nobody reads what it gives
    node.op_type = form.op_type
    for name in tuple(node.attributes):
        if name not in form.attributes:
            node.attributes.pop(name)
    node.attributes.update(form.attributes)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _set_flat(form: Form, scope: Scope) -> None:
    """The operator on its input as a matrix, and the shape put back after it."""
    edit, source, name = Edit(form.node, scope), form.node.inputs[0], form.node.name
    around = [f"{name}/{part}" if name else None for part in ("shape", "flat", "back")]
    shape = edit.op("Shape", [source], name=around[0])
    flat = edit.op("Flatten", [source], {"axis": form.flatten or 0}, name=around[1])
    result = edit.op(form.op_type, [flat], form.attributes, name=name)
    allow = {"allowzero": 1} if form.version >= 14 else {}
    edit.replace(form.node.outputs[0], edit.op("Reshape", [result, shape], allow, name=around[2])).commit()
