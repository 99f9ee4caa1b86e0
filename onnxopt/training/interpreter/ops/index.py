"""Reading and writing at positions that are data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from onnxopt.training.interpreter.registry import Table, op
from onnxopt.training.interpreter.values import CARRIERS

__all__ = ["TABLE"]


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    at = _wrapped(indices, x.shape[axis])
    axis %= x.dim()
    if axis == 0 and x.dim() == 2 and x.dtype.is_floating_point:
        return torch.nn.functional.embedding(at, x)
    found = x.index_select(axis, at.reshape(-1))
    return found.reshape((*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]))


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


def _places(x: Tensor, indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """Index tensors, one an axis, of what the last axis of `indices` says behind `batch_dims` axes."""
    parts = [_wrapped(part, x.shape[batch_dims + i]) for i, part in enumerate(indices.unbind(-1))]
    shape = tuple(indices.shape[:-1])
    batches = [
        torch.arange(n, device=x.device).reshape([-1 if j == i else 1 for j in range(len(shape))])
        for i, n in enumerate(shape[:batch_dims])
    ]
    return (*batches, *parts)


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    return x[_places(x, indices, batch_dims)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    at = _wrapped(indices, x.shape[axis])
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCE[reduction])


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    updates = updates.to(x.dtype)
    if reduction in ("none", "add"):
        return x.index_put(_places(x, indices, 0), updates, reduction == "add")
    depth = indices.shape[-1]
    sizes = x.shape[:depth]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.long, device=x.device)
    for part, size in zip(indices.unbind(-1), sizes, strict=True):
        flat = flat * size + _wrapped(part, size)
    rest = tuple(x.shape[depth:])
    rows = x.reshape(math.prod(sizes), -1)
    at = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    new = rows.scatter_reduce(0, at, updates.reshape(at.shape), _REDUCE[reduction])
    return new.reshape(*sizes, *rest)


def _one_hot(indices: Tensor, depth: Sequence[int], values: Tensor, *, axis: int = -1) -> Tensor:
    size = int(depth[0])
    at = indices.long()
    steps = torch.arange(size, device=indices.device)
    axis = axis % (indices.dim() + 1)
    steps = steps.reshape([size if i == axis else 1 for i in range(indices.dim() + 1)])
    return torch.where(torch.where(at < 0, at + size, at).unsqueeze(axis) == steps, values[1], values[0])


def _compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    x = x.reshape(-1) if axis is None else x
    return x.index_select(axis or 0, condition.nonzero().reshape(-1))


def _trilu(x: Tensor, k: Sequence[int] | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, int(k[0]) if k else 0)


def _eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    kind = x.dtype if dtype is None else CARRIERS[ir.DataType(dtype)]
    ones = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    return (ones.tril(k) & ones.triu(k)).to(kind)


def _reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    sizes = [1] * x.dim()
    sizes[time_axis] = x.shape[time_axis]
    at = torch.arange(x.shape[time_axis], device=x.device).reshape(sizes)
    sizes = [1] * x.dim()
    sizes[batch_axis] = x.shape[batch_axis]
    ends = lengths.long().reshape(sizes)
    return x.gather(time_axis, torch.where(at < ends, ends - 1 - at, at).expand(x.shape))


def _unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:  # noqa: A002
    _, inverse, counts = torch.unique(x.detach(), True, True, True, axis)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full((counts.numel(),), inverse.numel(), device=x.device)
    first = first.scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        first, counts, inverse = first[order], counts[order], order.argsort()[inverse]
    values = x.reshape(-1)[first] if axis is None else x.index_select(axis, first)
    return values, first, inverse, counts


def _nonzero(x: Tensor) -> Tensor:
    return x.nonzero().t()


def _tensor_scatter(
    cache: Tensor, update: Tensor, start: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    axis %= cache.dim()
    size, count = cache.shape[axis], update.shape[axis]
    at = torch.arange(count, device=cache.device).reshape(
        [-1 if i == axis else 1 for i in range(cache.dim())]
    )
    if start is not None:
        at = at + start.long().reshape(-1, *[1] * (cache.dim() - 1))
    return cache.scatter(axis, (at % size if mode == "circular" else at).expand(update.shape), update)


TABLE: Table = {
    "Compress": op(_compress),
    "EyeLike": op(_eye_like),
    "Gather": op(_gather),
    "GatherElements": op(_gather_elements),
    "GatherND": op(_gather_nd),
    "NonZero": op(_nonzero),
    "OneHot": op(_one_hot, 1),
    "ReverseSequence": op(_reverse_sequence),
    "Scatter": op(_scatter_elements),
    "ScatterElements": op(_scatter_elements),
    "ScatterND": op(_scatter_nd),
    "TensorScatter": op(_tensor_scatter),
    "Trilu": op(_trilu, 1),
    "Unique": op(_unique),
}
