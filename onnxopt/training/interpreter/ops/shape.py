"""Shapes and the moving of data: nothing here computes a new number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.registry import Context, Operator, Table, op
from onnxopt.training.interpreter.values import CARRIERS, Host

__all__ = ["TABLE"]

_INT, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def _shape(x: Any, *, start: int = 0, end: int | None = None) -> Host:
    sizes = tuple(x.shape)[start:end]
    return Host(torch.int64, (len(sizes),), sizes)


def _size(x: Any) -> Host:
    return Host(torch.int64, (), (math.prod(x.shape),))


def _reshape(x: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    if 0 in shape and not allowzero:
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(tuple(shape))


def _squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes)) if axes else x


def _unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))) if perm is None else tuple(perm))


def _concat(*values: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(values, axis)


def _split(
    x: Tensor,
    split: Sequence[int] | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    ctx: Context,
) -> tuple[Tensor, ...]:
    size, parts = x.shape[axis], num_outputs or ctx.outputs
    return x.split(list(split) if split else math.ceil(size / parts), axis)


def _slice(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    where: list[Any] = [slice(None)] * x.dim()
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[i] if axes else i) % x.dim(), steps[i] if steps else 1
        size = x.shape[axis]
        chosen = range(size)[start : None if step < 0 and end < -size else end : step]
        if step > 0:
            where[axis] = slice(chosen.start, max(chosen.stop, chosen.start), step)
            continue
        x = x.flip(axis)
        where[axis] = slice(size - 1 - chosen.start, max(size - 1 - chosen.stop, 0), -step)
    return x[tuple(where)]


def _expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(shape)))


def _tile(x: Tensor, repeats: Sequence[int]) -> Tensor:
    return x.repeat(tuple(repeats))


_MODES = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}


def _pad(
    x: Tensor,
    pads: Sequence[int],
    value: Any = None,
    axes: Sequence[int] | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    over = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
    begins, ends = pads[: len(over)], pads[len(over) :]
    both = [(0, 0)] * x.dim()
    for axis, begin, end in zip(over, begins, ends, strict=True):
        both[axis] = (begin, end)
    if mode == "constant":
        flat = [n for pair in reversed(both) for n in pair]
        if isinstance(value, Tensor):
            mask = F.pad(torch.ones_like(x, dtype=torch.bool), flat)
            return torch.where(mask, F.pad(x, flat), value)
        return F.pad(x, flat, value=(value[0] if isinstance(value, tuple) else value) or 0)
    for axis, (begin, end) in enumerate(both):
        if begin or end:
            x = x.index_select(axis, _reflected(x.shape[axis], begin, end, mode, x.device))
    return x


def _reflected(size: int, begin: int, end: int, mode: str, device: torch.device) -> Tensor:
    """The positions that stand before, in and after an axis of `size`."""
    at = torch.arange(-begin, size + end, device=device)
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return at % size
    period = max(2 * (size - 1), 1)
    return (size - 1) - ((at % period) - (size - 1)).abs()


def _constant(**attributes: Any) -> Any:
    (name, value), *_ = attributes.items()
    if name == "value":
        return value
    dtype = torch.float32 if name.startswith("value_float") else torch.int64
    shape = (len(value),) if name.endswith("s") else ()
    return Host(dtype, shape, tuple(value) if shape else (value,))


def _constant_of_shape(shape: Sequence[int], *, value: Any = None) -> Tensor:
    filler = value if isinstance(value, Host) else Host(torch.float32, (1,), (0.0,))
    return torch.full(tuple(shape), filler.data[0], dtype=filler.dtype)


def _normal(x: Tensor, *, mean: float = 0.0, scale: float = 1.0, **_: Any) -> Tensor:
    return torch.randn_like(x) * scale + mean


def _uniform(x: Tensor, *, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return torch.rand_like(x) * (high - low) + low


def _drawn(name: str, draw: Callable[..., Tensor]) -> dict[str, Operator]:
    """Of a shape, and like a tensor; torch's seed counts, the numbers of `seed` are the runtime's own."""

    def of_shape(*, shape: Sequence[int], dtype: int = _FLOAT, **how: Any) -> Tensor:
        return draw(torch.empty(tuple(shape), dtype=CARRIERS[ir.DataType(dtype)]), **how)

    def like(x: Tensor, *, dtype: int | None = None, **how: Any) -> Tensor:
        own = x.dtype if dtype is None else CARRIERS[ir.DataType(dtype)]
        return draw(torch.empty_like(x, dtype=own), **how)

    to_device = op(of_shape, host=False, either=(0,))
    return {name: to_device, f"{name}Like": op(like, host=False)}


def _range(start: Sequence[Any], limit: Sequence[Any], delta: Sequence[Any], *, ctx: Context) -> Tensor:
    count = max(math.ceil((limit[0] - start[0]) / delta[0]), 0)
    known = ctx.inputs[0] or (_INT if isinstance(start[0], int) else _FLOAT)
    dtype = CARRIERS[known]
    return torch.arange(count, dtype=dtype) * delta[0] + start[0]


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    x = x.permute((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return x.reshape(n, c * b * b, h // b, w // b)


TABLE: Table = {
    **_drawn("RandomNormal", _normal),
    **_drawn("RandomUniform", _uniform),
    "Concat": op(_concat),
    "Constant": op(_constant, raw=True),
    "ConstantOfShape": op(_constant_of_shape, 0),
    "DepthToSpace": op(_depth_to_space),
    "Expand": op(_expand, 1),
    "Flatten": op(_flatten),
    "Identity": op(lambda x: x, raw=True),
    "Pad": op(_pad, 1, 3),
    "Range": op(_range, 0, 1, 2),
    "Reshape": op(_reshape, 1),
    "Shape": op(_shape, raw=True),
    "Size": op(_size, raw=True),
    "Slice": op(_slice, 1, 2, 3, 4),
    "SpaceToDepth": op(_space_to_depth),
    "Split": op(_split, 1),
    "Squeeze": op(_squeeze, 1),
    "Tile": op(_tile, 1),
    "Transpose": op(_transpose),
    "Unsqueeze": op(_unsqueeze, 1),
}
