"""The tables of operators, by theme."""

from __future__ import annotations

from onnxopt.training.ops import index, math, nn, quantize, shape

TABLES = (index.TABLE, math.TABLE, nn.TABLE, quantize.TABLE, shape.TABLE)
"""All tables; no operator is in two."""
