"""The workflows behind the public functions."""

from onnxopt.api.optimize import optimize
from onnxopt.api.quantize import quantize

__all__ = ["optimize", "quantize"]
