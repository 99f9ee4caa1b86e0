"""Arithmetic, logic, activations and products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.minifloat import round_to
from onnxopt.training.interpreter.registry import Context, Table, op, same
from onnxopt.training.interpreter.values import CARRIERS, NATIVE

__all__ = ["TABLE", "convert", "gemm", "linear"]

_T = ir.DataType
_BITS = {_T.INT4: 4, _T.UINT4: 4, _T.INT2: 2, _T.UINT2: 2, _T.UINT16: 16, _T.UINT32: 32}


def _legacy(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Before version 7 the second operand was lined up with an axis of the first."""

    def lined_up(a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0, **_: Any) -> Tensor:
        if broadcast and axis is not None:
            b = b.reshape(*b.shape, *[1] * (a.dim() - b.dim() - axis % a.dim()))
        return run(a, b)

    return lined_up


def _binary(run: Callable[..., Tensor]) -> tuple[Any, Any]:
    return op(_legacy(run)), op(run, since=7)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    if not a.dtype.is_floating_point and b.dtype.is_floating_point:
        return torch.pow(a.double(), b.double()).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


def _sqrt(x: Tensor) -> Tensor:
    """Its gradient at 0, which is no number, is 0: the magnitude of a silent bin has none."""
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def _shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    return a << b if direction == "LEFT" else a >> b


def _mean(*values: Tensor) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


def _isinf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    return torch.isneginf(x) if detect_negative else torch.isposinf(x) & bool(detect_positive)


def _clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:  # noqa: A002 - ONNX's own names
    if not x.dtype.is_floating_point and isinstance(min, Tensor) and isinstance(max, Tensor):
        return torch.minimum(torch.maximum(x, min), max)
    return x if min is None and max is None else torch.clamp(x, min, max)


def _softmax(run: Callable[..., Tensor]) -> tuple[Any, Any]:
    def flat(x: Tensor, *, axis: int = 1) -> Tensor:
        axis = axis % x.dim() if x.dim() else 0
        return run(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)

    def by_axis(x: Tensor, *, axis: int = -1) -> Tensor:
        return run(x, axis)

    return op(flat), op(by_axis, since=13)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _prelu_old(x: Tensor, slope: Tensor) -> Tensor:
    return _prelu(x, slope.reshape(-1, *[1] * (x.dim() - 2)) if slope.dim() == 1 else slope)


def _shrink(x: Tensor, *, lambd: float = 0.5, bias: float = 0.0) -> Tensor:
    low, high = torch.where(x < -lambd, x + bias, 0), torch.where(x > lambd, x - bias, 0)
    return (low + high).to(x.dtype)


_SELU = (1.67326319217681884765625, 1.05070102214813232421875)

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Celu": lambda x, *, alpha=1.0: F.celu(x, alpha),
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Gelu": _gelu,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: torch.clamp(x * alpha + beta, 0, 1),
    "HardSwish": lambda x: x * torch.clamp(x * (1 / 6) + 0.5, 0, 1),
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Mish": F.mish,
    "Relu": torch.relu,
    "Selu": lambda x, *, alpha=_SELU[0], gamma=_SELU[1]: gamma * F.elu(x, alpha),
    "Shrink": _shrink,
    "Sigmoid": torch.sigmoid,
    "Softplus": lambda x: F.softplus(x),
    "Softsign": lambda x: x / (1 + x.abs()),
    "Swish": lambda x, *, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Tanh": torch.tanh,
    "ThresholdedRelu": lambda x, *, alpha=1.0: torch.where(x > alpha, x, 0),
}

_UNARY: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.linalg.det,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsInf": _isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": _sqrt,
    "Tan": torch.tan,
}

_BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Div": _div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _pow,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

_VARIADIC: dict[str, Callable[..., Tensor]] = {
    "Max": lambda *values: functools.reduce(torch.maximum, values),
    "Mean": _mean,
    "Min": lambda *values: functools.reduce(torch.minimum, values),
    "Sum": lambda *values: functools.reduce(torch.add, values),
}


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's own names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    a, b = a.t() if transA else a, b.t() if transB else b
    if not a.dtype.is_floating_point or c is None:
        found = alpha * (a @ b) if alpha != 1 else a @ b
        return found.to(a.dtype) if c is None else (found + beta * c).to(a.dtype)
    if c.dim() > 2 or alpha == 0:
        return alpha * (a @ b) + beta * c
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, turned: bool) -> Tensor:
    """MatMul by a matrix (or by its transpose), then Add of a vector: one product for torch."""
    return F.linear(x, weight if turned else weight.t(), bias)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.is_floating_point or not a.dtype.is_signed or a.dtype in (torch.int32, torch.int64):
        return torch.matmul(a, b)
    return torch.matmul(a.int(), b.int()).to(a.dtype)


def _einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *values)


def _bit_cast(x: Tensor, *, to: int, ctx: Context) -> Tensor:
    source = ctx.inputs[0]
    own = x if source is None or source not in NATIVE else x.to(NATIVE[source])
    return own.view(NATIVE[_T(to)]).to(CARRIERS[_T(to)])


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def convert(x: Tensor, to: int, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """Cast to the carrier of an ONNX type, with that type's rounding and wrapping."""
    dtype = _T(to)
    if dtype == _T.BOOL:
        return x != 0
    if dtype in _BITS:
        bits = _BITS[dtype]
        whole = x.to(torch.int64) & ((1 << bits) - 1)
        if dtype in (_T.INT4, _T.INT2):
            whole = (whole ^ (1 << (bits - 1))) - (1 << (bits - 1))
        return whole.to(CARRIERS[dtype])
    if dtype.is_floating_point() and CARRIERS[dtype] == torch.float32 and dtype != _T.FLOAT:
        return round_to(x.float(), dtype, saturate=saturate, round_mode=round_mode)
    if x.dtype.is_floating_point and not CARRIERS[dtype].is_floating_point and not dtype.is_signed():
        return x.to(torch.int64).to(CARRIERS[dtype])
    return x.to(CARRIERS[dtype])


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return convert(x, to, bool(saturate), round_mode)


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up", ctx: Context) -> Tensor:
    to = ctx.inputs[1]
    return x.to(like.dtype) if to is None else convert(x, to, bool(saturate), round_mode)


TABLE: Table = {
    **same(_UNARY),
    **same(_ACTIVATIONS),
    **{name: _binary(run) for name, run in _BINARY.items()},
    **same(_VARIADIC),
    "BitCast": op(_bit_cast),
    "BitShift": op(_shift),
    "onnxopt::Linear": op(linear),
    "Cast": op(_cast),
    "CastLike": op(_cast_like),
    "Clip": op(_clip),
    "Einsum": op(_einsum),
    "Gemm": op(gemm),
    "Hardmax": _softmax(_hardmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": op(_matmul),
    "Mod": op(_mod),
    "PRelu": (op(_prelu_old), op(_prelu, since=7)),
    "Softmax": _softmax(torch.softmax),
    "Where": op(_where),
}
