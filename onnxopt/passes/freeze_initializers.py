"""Fix initializers that are also graph inputs, so that they are constants to the other passes.

Before: graph inputs x, w, where w has an initializer that gives its default
After:  graph input x; w is an initializer only
Declines: nothing. Changes the signature: callers can no longer override these values.

The IR version is raised to 4 where it is lower: before, each initializer had to be a graph input.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.ledger import Ledger

__all__ = ["FreezeInitializers"]

_FIRST_WITHOUT_INPUTS = 4
"""The first IR version in which an initializer need not be a graph input."""


@dataclass(frozen=True)
class FreezeInitializers(Pass):
    """Take initializers off the graph inputs."""

    name = "freeze-initializers"
    example = """
agraph (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> {
    y = Mul(x, w)
}
    """
    keeps_signature = False

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        inputs = model.graph.inputs
        frozen = {
            v for v in inputs if v.is_initializer() and ledger.claim("overridable initializer", v.name or "")
        }
        if not frozen:
            return
        kept = [value for value in inputs if value not in frozen]
        inputs.clear()
        inputs.extend(kept)
        model.ir_version = max(model.ir_version, _FIRST_WITHOUT_INPUTS)
