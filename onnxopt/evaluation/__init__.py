"""What nodes compute, in numpy and without a runtime: used to fold constants and to follow shapes."""

from __future__ import annotations

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.dims import Dims, DimsOf
from onnxopt.evaluation.evaluator import KERNELS, MOVES, evaluate
from onnxopt.evaluation.extents import BROADCAST
from onnxopt.evaluation.facts import UNKNOWN, Facts
from onnxopt.evaluation.known import known_array
from onnxopt.evaluation.sizes import Dim, Size, broadcast, divide, is_natural, named, product

__all__ = [
    "BROADCAST",
    "KERNELS",
    "MOVES",
    "UNKNOWN",
    "CannotEvaluateError",
    "Dim",
    "Dims",
    "DimsOf",
    "Facts",
    "Size",
    "broadcast",
    "divide",
    "evaluate",
    "is_natural",
    "known_array",
    "named",
    "product",
]
