"""What nodes compute, in numpy and without a runtime: used to fold constants and to follow shapes."""

from __future__ import annotations

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.evaluator import KERNELS, MOVES, evaluate
from onnxopt.evaluation.facts import UNKNOWN, Facts

__all__ = ["KERNELS", "MOVES", "UNKNOWN", "CannotEvaluateError", "Facts", "evaluate"]
