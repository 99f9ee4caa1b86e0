"""The tables of operators, by theme."""

from __future__ import annotations

from onnxopt.training.ops import attention, control, index, math, nn, quantize, recurrent, shape, vision

TABLES = (
    *(attention.TABLE, control.TABLE, index.TABLE, math.TABLE, nn.TABLE),
    *(quantize.TABLE, recurrent.TABLE, shape.TABLE, vision.TABLE),
)
"""All tables; no operator is in two."""
