"""Rounding that gradients pass: to whole numbers, and to floats of eight bits and fewer.

Source: ONNX, "Float stored in 8 bits" and the like. Their values are carried in float32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["LARGEST", "passed", "round_to"]

_T = ir.DataType
_NATIVE = {
    _T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _T.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _T.FLOAT8E5M2: torch.float8_e5m2,
    _T.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
LARGEST = {**{dtype: torch.finfo(kind).max for dtype, kind in _NATIVE.items()}, _T.FLOAT4E2M1: 6.0}
"""The largest finite value of each type."""


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_through: Any = _Passed.apply


def passed(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`: the straight-through estimator."""
    return _through(x, rounded) if x.requires_grad else rounded


def round_to(x: Tensor, dtype: ir.DataType, *, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """float32 rounded to the values of a type, half to even; gradients pass where it does not saturate.

    Without `saturate` what is too large is infinity, or NaN for types without one. `round_mode` is for the
    powers of two of FLOAT8E8M0 alone.
    """
    if dtype == _T.FLOAT8E8M0:
        return _power_of_two(x, saturate, round_mode)
    x = x.clamp(-LARGEST[dtype], LARGEST[dtype]) if saturate or dtype == _T.FLOAT4E2M1 else x
    if dtype != _T.FLOAT4E2M1:
        found = x.detach().to(_NATIVE[dtype]).to(torch.float32)
        if dtype == _T.FLOAT8E4M3FN:  # torch saturates by itself; half a step above 448 is still 448
            found = torch.where(x.detach().abs() > 464, torch.nan, found)
        return passed(x, found)
    size = x.detach().nan_to_num(-0.0).abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return passed(x, torch.copysign((size / step).round() * step, x.detach().nan_to_num(-0.0)))


def _power_of_two(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    fraction, exponent = torch.frexp(x.detach().double().abs())
    least = {"up": fraction > 0.5, "nearest": fraction >= 0.75, "down": fraction > 1}[round_mode]
    power = torch.where(fraction == 0, -127, exponent - 1 + least.to(exponent.dtype))
    value = torch.ldexp(torch.ones_like(fraction), power.clamp(-127, 127))
    if not saturate:
        value = torch.where((power > 127) | (power < -127), torch.nan, value)
    value = torch.where(x.isnan() | (x < 0), torch.nan, value)
    return torch.where(x.isinf() & (not saturate), torch.nan, value).float()
