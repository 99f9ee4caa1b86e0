"""The workflows behind the public functions."""

from onnxopt.api.optimization import optimize
from onnxopt.api.packing import Package, pack, unpack
from onnxopt.api.pruning import prune
from onnxopt.api.quantization import quantize

__all__ = ["Package", "optimize", "pack", "prune", "quantize", "unpack"]
