"""The workflows behind the public functions."""

from onnxopt.api.optimization import optimize
from onnxopt.api.quantization import quantize

__all__ = ["optimize", "quantize"]
