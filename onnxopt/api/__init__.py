"""The workflows behind the public functions."""

from onnxopt.api.optimization import optimize
from onnxopt.api.pruning import prune
from onnxopt.api.quantization import quantize

__all__ = ["optimize", "prune", "quantize"]
