"""The trainer: an ONNX graph as a torch module, and its trained weights back in the same graph.

The only room that imports torch; ``pip install 'onnxopt[train]'``.
"""

from __future__ import annotations

from onnxopt.training.module import GraphModule, Logits, to_torch
from onnxopt.training.writing import write_back

__all__ = ["GraphModule", "Logits", "to_torch", "write_back"]
