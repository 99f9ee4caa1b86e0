"""Remove Identity nodes.

Before: y = Identity(x); z = Relu(y)
After:  z = Relu(x)
Declines: y is a graph output whose value is a graph input, an initializer, comes from outside the
    graph, or is a graph output itself; x is a sequence or optional that y is an output of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.pipeline import Pass
from onnxopt.rewrite import Edit, Rule, Scope

__all__ = ["EliminateIdentity"]


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Let the readers of an Identity's output read its input."""

    name = "eliminate-identity"

    def rules(self) -> Sequence[Rule]:
        return (Rule("Identity", ("Identity",), _identity),)


def _identity(node: ir.Node, scope: Scope) -> Edit | None:
    source = node.inputs[0]
    return None if source is None else Edit(node, scope).replace(node.outputs[0], source)
