"""The tables of operators, by theme."""

from __future__ import annotations

from onnxopt.training.ops import (
    attention,
    contrib,
    control,
    index,
    math,
    nn,
    quantize,
    recurrent,
    shape,
    vision,
)
from onnxopt.training.registry import Table

TABLES: tuple[Table, ...] = (
    *(attention.TABLE, contrib.TABLE, control.TABLE, index.TABLE, math.TABLE, nn.TABLE),
    *(quantize.TABLE, recurrent.TABLE, shape.TABLE, vision.TABLE),
)
"""All tables; no operator is in two."""
