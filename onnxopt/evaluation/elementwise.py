"""Kernels that work element by element, with ONNX's semantics where numpy's differ.

Integer division truncates, Round is half to even, a Cast of a float that its target cannot hold is refused
(the standard leaves it open, and machines differ), 16-bit floats are computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.call import Call, CannotEvaluateError, Kernel, is_float, widened
from onnxopt.graph import float_attr, int_attr

__all__ = ["ELEMENTWISE"]

Function = Callable[..., np.ndarray]

_EXACT = 2.0**53
"""Above it not every integer is a float64."""


def _unary(function: Function) -> Kernel:
    def kernel(call: Call) -> np.ndarray:
        x = call.array()
        return np.asarray(function(widened(x))).astype(x.dtype)

    return kernel


def _predicate(function: Function) -> Kernel:
    return lambda call: np.asarray(function(call.array()), np.bool_)


def _binary(function: Function) -> Kernel:
    def kernel(call: Call) -> np.ndarray:
        _check_broadcast(call)
        a, b = call.array(0), call.array(1)
        return np.asarray(function(widened(a), widened(b))).astype(np.result_type(a.dtype, b.dtype))

    return kernel


def _comparison(function: Function) -> Kernel:
    def kernel(call: Call) -> np.ndarray:
        _check_broadcast(call)
        return np.asarray(function(call.array(0), call.array(1)), np.bool_)

    return kernel


def _variadic(function: Function, *, mean: bool = False) -> Kernel:
    def kernel(call: Call) -> np.ndarray:
        call.room_for_broadcast()
        arrays = call.present()
        total = np.asarray(functools.reduce(function, (widened(array) for array in arrays)))
        result = total / np.asarray(len(arrays), total.dtype) if mean else total
        return result.astype(arrays[0].dtype)

    return kernel


def _check_broadcast(call: Call) -> None:
    """Below opset 7 broadcasting was asked for, and aligned, by attributes."""
    a, b = call.array(0), call.array(1)
    if call.opset < 7 and a.shape != b.shape and ("axis" in call.node.attributes or b.ndim > a.ndim):
        raise CannotEvaluateError("it broadcasts along an axis, as before opset 7")
    call.room_for_broadcast()


def _relu(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(x, np.zeros((), x.dtype)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.reciprocal(np.ones((), x.dtype) + np.exp(-x)))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(element) for element in x.ravel().tolist()], x.dtype).reshape(x.shape)


def _need_divisor(b: np.ndarray) -> None:
    if not is_float(b.dtype) and not np.all(b):
        raise CannotEvaluateError("an integer is divided by zero")


def _div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    _need_divisor(b)
    return np.asarray(np.divide(a, b) if is_float(a.dtype) else (a - np.fmod(a, b)) // b)


def _mod(call: Call) -> np.ndarray:
    call.room_for_broadcast()
    a, b = call.array(0), call.array(1)
    _need_divisor(b)
    fmod = int_attr(call.node, "fmod", 0)
    if is_float(a.dtype) and not fmod:
        raise CannotEvaluateError("Mod of floats needs fmod=1")
    return np.asarray((np.fmod if fmod else np.mod)(widened(a), widened(b))).astype(a.dtype)


def _pow(call: Call) -> np.ndarray:
    _check_broadcast(call)
    base, exponent = call.array(0), call.array(1)
    result = np.power(base.astype(np.float64), exponent.astype(np.float64))
    if not is_float(base.dtype):
        _need_exact(result, base.dtype)
    return result.astype(base.dtype)


def _need_exact(x: np.ndarray, dtype: np.dtype) -> None:
    """Refuse floats that have no integer of the type, up to where all integers are float64."""
    limits = np.iinfo(dtype)
    low, high = max(-_EXACT, float(limits.min)), min(_EXACT, float(limits.max))
    if not np.all((np.trunc(x) >= low) & (np.trunc(x) <= high)):
        raise CannotEvaluateError(f"a float is outside the range of {dtype}, where runtimes differ")


def _cast(call: Call) -> np.ndarray:
    return _convert(call.array(), ir.DataType(int_attr(call.node, "to", 0)).numpy())


def _cast_like(call: Call) -> np.ndarray:
    return _convert(call.array(0), call.array(1).dtype)


def _convert(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not all(kind.kind in "biuf" or kind == ml_dtypes.bfloat16 for kind in (x.dtype, dtype)):
        raise CannotEvaluateError(f"a Cast from {x.dtype} to {dtype} is left to the runtime")
    if is_float(x.dtype) and dtype.kind in "iu":
        _need_exact(x.astype(np.float64), dtype)
    if is_float(x.dtype) and dtype.kind == "b":
        return np.asarray(x.astype(np.float64) != 0)
    return x.astype(dtype)


def _clip(call: Call) -> np.ndarray:
    x = call.array()
    low: np.ndarray | None
    high: np.ndarray | None
    if call.opset < 11:
        limits = np.finfo(np.float32)
        low = np.asarray(float_attr(call.node, "min", float(limits.min)), x.dtype)
        high = np.asarray(float_attr(call.node, "max", float(limits.max)), x.dtype)
    else:
        low, high = call.optional(1), call.optional(2)
    result = x if low is None else np.maximum(x, low)
    return np.asarray(result if high is None else np.minimum(result, high), x.dtype)


def _where(call: Call) -> np.ndarray:
    call.room_for_broadcast()
    return np.where(call.array(0), call.array(1), call.array(2))


ELEMENTWISE: dict[str, Kernel] = {
    "Abs": _unary(np.abs),
    "Add": _binary(np.add),
    "And": _comparison(np.logical_and),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(np.ceil),
    "Clip": _clip,
    "Cos": _unary(np.cos),
    "Div": _binary(_div),
    "Equal": _comparison(np.equal),
    "Erf": _unary(_erf),
    "Exp": _unary(np.exp),
    "Floor": _unary(np.floor),
    "Greater": _comparison(np.greater),
    "GreaterOrEqual": _comparison(np.greater_equal),
    "IsNaN": _predicate(np.isnan),
    "Less": _comparison(np.less),
    "LessOrEqual": _comparison(np.less_equal),
    "Log": _unary(np.log),
    "Max": _variadic(np.maximum),
    "Mean": _variadic(np.add, mean=True),
    "Min": _variadic(np.minimum),
    "Mod": _mod,
    "Mul": _binary(np.multiply),
    "Neg": _unary(np.negative),
    "Not": _predicate(np.logical_not),
    "Or": _comparison(np.logical_or),
    "Pow": _pow,
    "Reciprocal": _unary(lambda x: np.ones((), x.dtype) / x),
    "Relu": _unary(_relu),
    "Round": _unary(np.rint),
    "Sigmoid": _unary(_sigmoid),
    "Sign": _unary(np.sign),
    "Sin": _unary(np.sin),
    "Sqrt": _unary(np.sqrt),
    "Sub": _binary(np.subtract),
    "Sum": _variadic(np.add),
    "Tanh": _unary(np.tanh),
    "Where": _where,
    "Xor": _comparison(np.logical_xor),
}
