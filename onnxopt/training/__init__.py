"""The trainer: an ONNX graph as a torch module, and its trained weights back in the same graph.

The only room that imports torch; ``pip install 'onnxopt[train]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxopt.training.distillation import distill
    from onnxopt.training.finetuning import finetune
    from onnxopt.training.interpreter.logits import Logits
    from onnxopt.training.interpreter.module import GraphModule, to_torch
    from onnxopt.training.interpreter.writing import write_back
    from onnxopt.training.kinds import DistillRecipe, PruneRecipe, QatRecipe
    from onnxopt.training.qat import train_qat
    from onnxopt.training.recipe import Recipe
    from onnxopt.training.sparsity import prune, recover

_HOMES = {
    "DistillRecipe": "kinds",
    "GraphModule": "interpreter.module",
    "Logits": "interpreter.logits",
    "PruneRecipe": "kinds",
    "QatRecipe": "kinds",
    "Recipe": "recipe",
    "distill": "distillation",
    "finetune": "finetuning",
    "prune": "sparsity",
    "recover": "sparsity",
    "to_torch": "interpreter.module",
    "train_qat": "qat",
    "write_back": "interpreter.writing",
}

__all__ = [
    "DistillRecipe",
    "GraphModule",
    "Logits",
    "PruneRecipe",
    "QatRecipe",
    "Recipe",
    "distill",
    "finetune",
    "prune",
    "recover",
    "to_torch",
    "train_qat",
    "write_back",
]


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
