"""Kernels that sum up along axes: reductions, ArgMax, CumSum, and products of matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxopt.evaluation.call import Call, CannotEvaluateError, Kernel, is_float, widened
from onnxopt.graph import float_attr, int_attr

__all__ = ["REDUCTION"]

Function = Callable[..., np.ndarray]


def _reduction(function: Function, *, floats: bool = False, noop: bool = True) -> Kernel:
    """`floats`: only on floats. `noop`: without axes and with noop_with_empty_axes it gives its input."""

    def kernel(call: Call) -> np.ndarray:
        x, axes = call.array(), call.ints("axes", 1)
        if floats and not is_float(x.dtype):
            raise CannotEvaluateError("a mean or root of integers, where runtimes differ")
        if not axes and int_attr(call.node, "noop_with_empty_axes", 0):
            if noop:
                return x
            raise CannotEvaluateError("a reduction of no axis, where runtimes differ")
        keep = bool(int_attr(call.node, "keepdims", 1))
        return np.asarray(function(widened(x), axis=axes or None, keepdims=keep)).astype(x.dtype)

    return kernel


def _sum(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    return np.asarray(np.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype))


def _log_sum_exp(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    peak = np.max(x, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, np.zeros((), x.dtype))
    total = np.log(_sum(np.exp(x - peak), axis, True)) + peak
    return total if keepdims else np.asarray(np.squeeze(total, axis))


def _arg(function: Function) -> Kernel:
    def kernel(call: Call) -> np.ndarray:
        x, axis = call.array(), int_attr(call.node, "axis", 0)
        if int_attr(call.node, "select_last_index", 0):
            found = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
        else:
            found = function(x, axis=axis)
        keep = int_attr(call.node, "keepdims", 1)
        return np.asarray(np.expand_dims(found, axis) if keep else found, np.int64)

    return kernel


def _cum_sum(call: Call) -> np.ndarray:
    x, axis = call.array(), int(call.array(1).reshape(()))
    reverse = int_attr(call.node, "reverse", 0)
    line = np.flip(x, axis) if reverse else x
    total = np.cumsum(widened(line), axis, dtype=widened(line).dtype)
    if int_attr(call.node, "exclusive", 0):
        total = np.roll(total, 1, axis)
        total[(slice(None),) * (axis % x.ndim) + (slice(0, 1),)] = 0
    return np.asarray(np.flip(total, axis) if reverse else total).astype(x.dtype)


def _matmul(call: Call) -> np.ndarray:
    a, b = call.array(0), call.array(1)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    call.room((*batch, *a.shape[-2:-1], *b.shape[-1:]), a.dtype.itemsize)
    return np.asarray(np.matmul(widened(a), widened(b))).astype(a.dtype)


def _gemm(call: Call) -> np.ndarray:
    a, b, c = call.array(0), call.array(1), call.optional(2)
    if not is_float(a.dtype):
        raise CannotEvaluateError("a Gemm of integers")
    left = widened(a.T if int_attr(call.node, "transA", 0) else a)
    right = widened(b.T if int_attr(call.node, "transB", 0) else b)
    if not left.shape[1]:
        raise CannotEvaluateError("a Gemm that adds up nothing, where a runtime leaves out beta")
    call.room((left.shape[0], right.shape[1]), a.dtype.itemsize)
    result = left.dtype.type(float_attr(call.node, "alpha", 1.0)) * (left @ right)
    if c is not None:
        result = result + left.dtype.type(float_attr(call.node, "beta", 1.0)) * widened(c)
    return np.asarray(result).astype(a.dtype)


REDUCTION: dict[str, Kernel] = {
    "ArgMax": _arg(np.argmax),
    "ArgMin": _arg(np.argmin),
    "CumSum": _cum_sum,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "ReduceL1": _reduction(lambda x, **k: _sum(np.abs(x), **k), noop=False),
    "ReduceL2": _reduction(lambda x, **k: np.sqrt(_sum(x * x, **k)), floats=True, noop=False),
    "ReduceLogSum": _reduction(lambda x, **k: np.log(_sum(x, **k)), floats=True, noop=False),
    "ReduceLogSumExp": _reduction(_log_sum_exp, floats=True, noop=False),
    "ReduceMax": _reduction(np.max),
    "ReduceMean": _reduction(np.mean, floats=True),
    "ReduceMin": _reduction(np.min),
    "ReduceProd": _reduction(np.prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, **k: _sum(x * x, **k), noop=False),
}
