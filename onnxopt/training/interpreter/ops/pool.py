"""Pooling with all its paddings and roundings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.ops.nn import CONV, flat, padding
from onnxopt.training.interpreter.registry import Context, Table, op

__all__ = ["TABLE"]

_MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _pooled(
    x: Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    strides: Sequence[int],
) -> tuple[list[int], list[int], list[int]]:
    """Elements to add before and after each axis, and how many of the latter only fill the last window."""
    sizes = x.shape[2:]
    begins, ends = padding(auto_pad, pads, sizes, kernel, strides, dilations)
    surplus = [0] * len(kernel)
    for i, (n, k, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        span = n + begins[i] + ends[i] - d * (k - 1) - 1
        count = math.ceil(span / s) if ceil_mode else 0
        if span < 0:  # runtimes round towards 0: one window
            surplus[i] = -span
        elif count * s < n + begins[i]:  # the last window starts within the input or the pads before it
            surplus[i] = max(count * s - span, 0)
    return begins, ends, surplus


def _max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    ctx: Context,
) -> Any:
    rank = len(kernel_shape)
    strides, dilations = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
    begins, ends, surplus = _pooled(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    ends = [a + b for a, b in zip(ends, surplus, strict=True)]
    half = all(b == e and 2 * b <= k for b, e, k in zip(begins, ends, kernel_shape, strict=True))
    if half and ctx.outputs < 2 and x.dtype.is_floating_point:
        return _MAX_POOL[rank](x, tuple(kernel_shape), strides, tuple(begins), dilations)
    wide = x if x.dtype.is_floating_point else x.double()
    padded = F.pad(wide, flat(begins, ends), value=-math.inf)
    many = ctx.outputs > 1
    found = _MAX_POOL[rank](padded, tuple(kernel_shape), strides, 0, dilations, return_indices=many)
    if not many:
        return found.to(x.dtype)
    values, at = found
    return values.to(x.dtype), _positions(at, padded.shape, x.shape, begins, storage_order)


def _positions(
    at: Tensor, padded: Sequence[int], sizes: Sequence[int], begins: Sequence[int], storage_order: int
) -> Tensor:
    """Positions in the padded planes as positions in the whole tensor."""
    where = []
    for n, begin in zip(reversed(padded[2:]), reversed(begins), strict=True):
        where.append(at % n - begin)
        at = at // n
    plane = torch.zeros_like(at)
    pairs = list(zip(reversed(where), sizes[2:], strict=True))
    for one, n in reversed(pairs) if storage_order else pairs:
        plane = plane * n + one
    count = sizes[0] * sizes[1]
    base = torch.arange(count, device=at.device).reshape(sizes[0], sizes[1], *[1] * (at.dim() - 2))
    return plane + base * math.prod(sizes[2:])


def _average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
    begins, ends, surplus = _pooled(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    if begins == ends and not any(surplus) and set(dilations) == {1} and rank <= 3:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        if all(2 * b <= k for b, k in zip(begins, kernel_shape, strict=True)):
            return pool(x, tuple(kernel_shape), strides, tuple(begins), False, bool(count_include_pad))
    inside = torch.ones_like(x[:1, :1])
    fill = float(bool(count_include_pad))
    inside = F.pad(F.pad(inside, flat(begins, ends), value=fill), flat([0] * rank, surplus))
    padded = F.pad(x, flat(begins, [a + b for a, b in zip(ends, surplus, strict=True)]))
    one = torch.ones((1, 1, *kernel_shape), dtype=x.dtype, device=x.device)
    planes = padded.reshape(-1, 1, *padded.shape[2:])
    total = CONV[rank](planes, one, None, strides, 0, dilations)
    count = CONV[rank](inside, one, None, strides, 0, dilations)
    return (total / count).reshape(*x.shape[:2], *total.shape[2:])


def _lp_pool(x: Tensor, *, p: int = 2, **attributes: Any) -> Tensor:
    count = math.prod(attributes["kernel_shape"])
    mean = _average_pool(x.abs() ** p, count_include_pad=1, **attributes)
    return (mean * count) ** (1 / p)


TABLE: Table = {
    "AveragePool": op(_average_pool),
    "LpPool": op(_lp_pool),
    "MaxPool": op(_max_pool),
}
