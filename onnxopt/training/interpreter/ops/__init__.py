"""The tables of operators, by theme."""

from __future__ import annotations

from onnxopt.training.interpreter.ops import (
    attention,
    contrib,
    control,
    index,
    math,
    nn,
    pool,
    quantize,
    recurrent,
    reduction,
    resize,
    shape,
    vision,
)
from onnxopt.training.interpreter.registry import Table

_THEMES = (
    *(attention, contrib, control, index, math, nn),
    *(pool, quantize, recurrent, reduction, resize, shape, vision),
)
TABLES: tuple[Table, ...] = tuple(theme.TABLE for theme in _THEMES)
"""All tables; no operator is in two."""
