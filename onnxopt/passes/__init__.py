"""The passes that ship with onnxopt, one a file."""

from __future__ import annotations

if __name__ != "onnxopt.passes":
    raise ImportError(f"import onnxopt.passes, not {__name__!r}: the passes would exist twice")

from onnxopt.passes.eliminate_identity import EliminateIdentity
from onnxopt.pipeline import Pass

__all__ = ["BUILTIN"]

BUILTIN: tuple[type[Pass], ...] = (EliminateIdentity,)
"""In the order of the default recipe."""
