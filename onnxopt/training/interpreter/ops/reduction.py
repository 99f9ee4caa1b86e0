"""Sums, extremes and the like over axes, and what runs along one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onnxopt.training.interpreter.registry import Table, op

__all__ = ["TABLE"]


def _reduction(run: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Any:
    """A reduction over axes, which are an attribute or, later, the second input."""

    def reduced(
        x: Tensor,
        axes: Sequence[int] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        if not axes and noop_with_empty_axes:
            return run(x.unsqueeze(0), (0,), False)
        over = tuple(sorted(axis % x.dim() for axis in axes)) if axes else tuple(range(x.dim()))
        return run(x, over, bool(keepdims)) if over else run(x.reshape(1), (0,), False)

    return op(reduced, 1)


def _extreme(largest: bool) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    run = torch.amax if largest else torch.amin

    def reduced(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if 0 not in [x.shape[axis] for axis in axes]:
            return run(x.byte(), axes, keep).bool() if x.dtype == torch.bool else run(x, axes, keep)
        if x.dtype == torch.bool:
            return x.any(axes[0], keep) if largest else x.all(axes[0], keep)
        if x.dtype.is_floating_point:
            return (x.sum(axes, keep) + (-math.inf if largest else math.inf)).to(x.dtype)
        info = torch.iinfo(x.dtype)
        return torch.full_like(x.sum(axes, keep), info.min if largest else info.max, dtype=x.dtype)

    return reduced


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True).to(x.dtype)
    return x if keep else x.reshape([n for i, n in enumerate(x.shape) if i not in axes])


def _total(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep).to(x.dtype)


def _reduced_mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).to(x.dtype)


def _norm(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not x.dtype.is_floating_point:
        return x.double().square().sum(axes, keepdim=keep).sqrt().to(x.dtype)
    return torch.linalg.vector_norm(x, 2, axes, keep)


_REDUCTIONS = {
    "ReduceL1": lambda x, axes, keep: _total(x.abs(), axes, keep),
    "ReduceL2": _norm,
    "ReduceLogSum": lambda x, axes, keep: _total(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": _extreme(True),
    "ReduceMean": _reduced_mean,
    "ReduceMin": _extreme(False),
    "ReduceProd": _prod,
    "ReduceSum": _total,
    "ReduceSumSquare": lambda x, axes, keep: _total(x * x, axes, keep),
}


def _arg(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def found(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return run(x, axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - run(x.flip(axis), axis, keepdim=bool(keepdims))

    return found


def _topk(
    x: Tensor,
    k: Sequence[int] | int,
    *,
    axis: int = -1,
    largest: int = 1,
) -> tuple[Tensor, Tensor]:
    # ties go to the lower index, which a stable sort keeps and topk does not
    count = k if isinstance(k, int) else k[0]
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _running(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def over(x: Tensor, axis: Sequence[int], *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        at = axis[0]
        x = x.flip(at) if reverse else x
        found = run(x, at).to(x.dtype)
        if exclusive:
            first = torch.full_like(found.narrow(at, 0, 1), 1 if run is torch.cumprod else 0)
            found = torch.cat((first, found.narrow(at, 0, found.shape[at] - 1)), at)
        return found.flip(at) if reverse else found

    return over


TABLE: Table = {
    **{name: _reduction(run) for name, run in _REDUCTIONS.items()},
    "ArgMax": op(_arg(torch.argmax)),
    "ArgMin": op(_arg(torch.argmin)),
    "CumProd": op(_running(torch.cumprod), 1),
    "CumSum": op(_running(torch.cumsum), 1),
    "TopK": op(_topk, 1),
}
