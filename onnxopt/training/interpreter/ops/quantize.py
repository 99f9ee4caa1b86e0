"""Quantization as the runtime does it, with gradients: a division, a clip, and then rounding half to even.

Integers that QuantizeLinear gives are carried as floats, so that gradients reach what is before it; behind
DequantizeLinear the two are one step, `fake_quantize`. Gradients: straight through the rounding, and for
the scale those of LSQ (Esser et al., arXiv 1902.08153), which need the clip before the rounding.

float16 is divided in single precision, as ONNX Runtime did up to 1.31. By the standard, since opset 23, and
in ONNX Runtime 1.32 the division is in the type of the scale: next to a tie that is another integer.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.errors import ModelError
from onnxopt.quantization.formats import INTEGERS
from onnxopt.training.interpreter.minifloat import passed, round_to
from onnxopt.training.interpreter.ops.nn import conv
from onnxopt.training.interpreter.registry import Context, Table, op
from onnxopt.training.interpreter.values import CARRIERS, Host, to_device

__all__ = ["TABLE", "dequantize", "fake_quantize", "quantize", "require_fit"]

_T = ir.DataType
_LIMITS = {**INTEGERS, _T.INT32: (-(2**31), 2**31 - 1)}
"""The least and the largest integer of a type; of biases, too."""

Zero = Tensor | Host | None
_BESIDE = 2.0**-20
"""Relative: some rounding errors of float32. What is so near to a limit is inside."""


def require_fit(x: Tensor, scale: Tensor, axis: int, block_size: int, site: str) -> None:
    """Raise ModelError where scales are not one, one a slice of `axis`, or one a block of it."""
    sizes, axis = list(x.shape), axis % max(x.dim(), 1)
    if block_size:
        fit = list(scale.shape) == [-(-n // block_size) if i == axis else n for i, n in enumerate(sizes)]
    else:
        fit = scale.numel() == 1 or [scale.numel()] == sizes[axis : axis + 1]
    if not fit:
        blocks = f" in blocks of {block_size}" if block_size else ""
        raise ModelError(
            f"training: {site}: a scale of shape {list(scale.shape)} does not fit {sizes} along axis "
            f"{axis}{blocks}"
        )


def spread(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points in a shape that goes with x: one, one a slice of `axis`, or one a block of it."""
    if values.numel() == 1 and not block_size:
        return values.reshape(())
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _zero(zero: Zero, x: Tensor, axis: int, block_size: int) -> Any:
    """A number where there is but one, whatever its shape: the quick way through `clamp`."""
    if zero is None:
        return 0.0
    if isinstance(zero, Host):
        if len(set(zero.data)) == 1:
            return float(zero.data[0])
        zero = to_device(zero, x.device)
    return spread(zero.to(x.dtype), x, axis, block_size)


class _Fake(torch.autograd.Function):
    """Rounded, clipped and scaled back; of x and the scale alone, the zero point is in the limits.

    By the scale, with v = x / s clipped to [low, high]: round(v) - x / s inside the limits, the limit
    outside, times 1 / sqrt(elements that share a scale * the largest integer). Kept for it are x / s and the
    result, which the operator that reads it keeps, too: sum g round(v) = sum g y / s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, most: float) -> Tensor:
        steps = x / scale
        found = steps.clamp(low, high).round_().add_(0.0).mul_(scale)  # integers know no -0
        bounds = [one for one in (low, high) if isinstance(one, Tensor)]
        ctx.save_for_backward(steps, scale, found, *bounds)
        ctx.limits = None if bounds else (low, high)
        ctx.factor = (x.numel() / scale.numel() * most) ** -0.5
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        steps, scale, found, *bounds = ctx.saved_tensors
        if ctx.limits is not None:  # one kernel, which leaves out the limits themselves
            low, high = ctx.limits
            beside = _BESIDE * max(abs(low), abs(high))
            by_x = torch.ops.aten.hardtanh_backward(grad, steps, low - beside, high + beside)
        else:
            by_x = grad * ((steps >= bounds[0]) & (steps <= bounds[1]))
        if not ctx.needs_input_grad[1]:
            return by_x, None, None, None, None
        if scale.numel() == 1:
            total = torch.dot(grad.reshape(-1), found.reshape(-1)) / scale
            total = (total - torch.dot(by_x.reshape(-1), steps.reshape(-1))).reshape(scale.shape)
        else:
            total = (grad * found / scale).sub_(by_x * steps).sum_to_size(scale.shape)
        return by_x, total * ctx.factor, None, None, None


_fake: Any = _Fake.apply


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """DequantizeLinear(QuantizeLinear(x)) in one step; scale and zero point in shapes that go with x."""
    return _fake(x, scale, low - zero, high - zero, float(high))


def _kind(ctx: Context, output_dtype: int, zero: Zero) -> ir.DataType:
    found = ctx.results[0] or (ctx.inputs[2] if len(ctx.inputs) > 2 else None)
    if found is None or not (output_dtype or zero is not None):
        return _T(output_dtype) if output_dtype else _T.UINT8
    return found


def _wide(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, of 32 bits at least."""
    kind = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    return x.to(kind), scale.to(kind)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Zero,
    dtype: ir.DataType,
    axis: int,
    block_size: int,
    saturate: bool = True,
) -> Tensor:
    """The integers (or small floats) of x, carried as floats."""
    x, scale = _wide(x, scale)
    steps = x / spread(scale, x, axis, block_size)
    if dtype not in _LIMITS:
        return round_to(steps, dtype, saturate=saturate)
    low, high = _LIMITS[dtype]
    offset = _zero(zero, x, axis, block_size)
    clipped = steps.clamp(low - offset, high - offset)
    return passed(clipped, clipped.detach().round()) + offset


def dequantize(q: Tensor, scale: Tensor, zero: Zero, axis: int, block_size: int) -> Tensor:
    """The floats that integers stand for, in the scale's type."""
    wide = q.to(torch.promote_types(scale.dtype, torch.float32))
    offset = _zero(zero, wide, axis, block_size)
    shifted = wide if isinstance(offset, float) and offset == 0 else wide - offset
    return (shifted * spread(scale.to(wide.dtype), wide, axis, block_size)).to(scale.dtype)


def _quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Zero = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    ctx: Context,
) -> Tensor:
    require_fit(x, scale, axis, block_size, ctx.site)
    return quantize(x, scale, zero, _kind(ctx, output_dtype, zero), axis, block_size, bool(saturate))


def _dequantize_linear(
    q: Tensor,
    scale: Tensor,
    zero: Zero = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    ctx: Context,
) -> Tensor:
    require_fit(q, scale, axis, block_size, ctx.site)
    found = dequantize(q, scale, zero, axis, block_size)
    return found.to(CARRIERS[_T(output_dtype)]) if output_dtype else found


def _both(
    x: Tensor,
    scale: Tensor,
    zero: Zero = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    offset: float | Tensor = 0.0,
    within: tuple[int, int] | None = None,
    output_dtype: int,
    ctx: Context,
) -> Tensor:
    """QuantizeLinear and DequantizeLinear; `offset` is a zero point that is one number for all.

    within: the least and the largest integer, where those are not the type's.
    """
    require_fit(x, scale, axis, block_size, ctx.site)
    kind, dtype = scale.dtype, _T(output_dtype)
    if dtype not in _LIMITS:
        return dequantize(quantize(x, scale, None, dtype, axis, block_size), scale, None, axis, block_size)
    wide, scale = _wide(x, scale)
    low, high = within or _LIMITS[dtype]
    offset = offset if zero is None else _zero(zero, wide, axis, block_size)
    return fake_quantize(wide, spread(scale, wide, axis, block_size), offset, low, high).to(kind)


def _dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(high == low, 1, (high - low) / 255)  # zeros alone have a scale, too
    zero = (-low / scale).clamp(0, 255).round()
    return quantize(x, scale, zero, _T.UINT8, 0, 0), scale, zero


def _centred(x: Tensor, zero: Zero, axis: int) -> Tensor:
    """Integers less their zero point, as doubles: sums of products of them are exact."""
    wide = x.double()
    if zero is None:
        return wide
    zero = to_device(zero, x.device) if isinstance(zero, Host) else zero
    zero = zero.double()
    if zero.numel() == 1:
        return wide - zero.reshape(())
    return wide - (
        zero if zero.dim() > 1 else zero.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    )


def _matmul_integer(a: Tensor, b: Tensor, zero_a: Zero = None, zero_b: Zero = None) -> Tensor:
    found = _centred(a, zero_a, -2) @ _centred(b, zero_b, -1)
    return found.to(torch.int32)


def _conv_integer(
    x: Tensor, w: Tensor, zero_x: Zero = None, zero_w: Zero = None, **attributes: Any
) -> Tensor:
    return conv(_centred(x, zero_x, 1), _centred(w, zero_w, 0), **attributes).to(torch.int32)


TABLE: Table = {
    "ConvInteger": op(_conv_integer, either=(2, 3)),
    "DequantizeLinear": op(_dequantize_linear, either=(2,)),
    "DynamicQuantizeLinear": op(_dynamic),
    "MatMulInteger": op(_matmul_integer, either=(2, 3)),
    "QuantizeLinear": op(_quantize_linear, either=(2,)),
    "com.microsoft::DequantizeLinear": op(_dequantize_linear, either=(2,)),
    "com.microsoft::QuantizeLinear": op(_quantize_linear, either=(2,)),
    "onnxopt::FakeQuantize": op(_both, either=(2,)),
}
