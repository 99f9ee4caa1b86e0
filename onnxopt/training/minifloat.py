"""Rounding to floats of eight bits and fewer, whose values are carried in float32."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

__all__ = ["round_to"]


def round_to(x: Tensor, dtype: ir.DataType, *, saturate: bool = True, round_mode: str = "up") -> Tensor:
    raise NotImplementedError
