"""The trainer: an ONNX graph as a torch module, and its trained weights back in the same graph.

The only room that imports torch; ``pip install 'onnxopt[train]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxopt.training.finetuning import finetune
    from onnxopt.training.module import GraphModule, Logits, to_torch
    from onnxopt.training.qat import train_qat
    from onnxopt.training.recipe import QatRecipe, Recipe
    from onnxopt.training.writing import write_back

_HOMES = {
    "GraphModule": "module",
    "Logits": "module",
    "QatRecipe": "recipe",
    "Recipe": "recipe",
    "finetune": "finetuning",
    "to_torch": "module",
    "train_qat": "qat",
    "write_back": "writing",
}

__all__ = ["GraphModule", "Logits", "QatRecipe", "Recipe", "finetune", "to_torch", "train_qat", "write_back"]


def __getattr__(name: str) -> object:
    """Names are imported when they are first used: recipes are read, and helped with, without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxopt.training' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"onnxopt.training.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from onnxopt.errors import UsageError

        raise UsageError("training needs torch: pip install 'onnxopt[train]'") from None
