"""Resize in all its modes: torch's own where it computes the same, else one matrix an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.registry import Table, op

__all__ = ["TABLE"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_HALF = ("half_pixel", "pytorch_half_pixel")


def _origins(
    size: int, count: int, scale: float, mode: str, roi: tuple[float, float], device: torch.device
) -> Tensor:
    """Where each of `count` results lies on an axis of `size` elements, as doubles."""
    at = torch.arange(count, dtype=torch.float64, device=device)
    length = scale * size
    if mode == "align_corners":
        return at * 0 if length == 1 else at * ((size - 1) / (length - 1))
    if mode == "asymmetric":
        return at / scale
    if mode == "tf_crop_and_resize":
        begin, span = roi[0] * (size - 1), (roi[1] - roi[0]) * (size - 1)
        return at * 0 + begin + span / 2 if length == 1 else at * (span / (length - 1)) + begin
    if mode == "pytorch_half_pixel" and length == 1:
        return at * 0 - 0.5
    offset = size / 2 * (1 - count / length) if mode == "half_pixel_symmetric" else 0
    return offset + (at + 0.5) / scale - 0.5


def _cubic(x: Tensor, a: float) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))


def _nearest(at: Tensor, mode: str) -> Tensor:
    if mode in ("floor", "ceil"):
        return torch.floor(at) if mode == "floor" else torch.ceil(at)
    return torch.ceil(at - 0.5) if mode == "round_prefer_floor" else torch.floor(at + 0.5)


def _weights(at: Tensor, size: int, cubic: bool, stretch: float, a: float, exclude: bool) -> Tensor:
    """[results, size]: how much of each element is in each result. stretch: below 1 against aliasing."""
    reach = math.ceil((2 if cubic else 1) / stretch)
    left = torch.ceil(at).long() - reach
    taps = left.unsqueeze(1) + torch.arange(2 * reach + 1, device=at.device)
    distance = (taps - at.unsqueeze(1)) * stretch
    parts = _cubic(distance, a) if cubic else (1 - distance.abs()).clamp(min=0)
    if exclude:
        parts = torch.where((taps < 0) | (taps >= size), 0, parts)
    if exclude or stretch < 1:
        parts = parts / parts.sum(1, keepdim=True)
    found = torch.zeros(len(at), size, dtype=torch.float64, device=at.device)
    return found.scatter_add(1, taps.clamp(0, size - 1), parts)


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """The product with a matrix over one axis."""
    return torch.tensordot(x, matrix.to(x.dtype), ([axis], [1])).movedim(-1, axis)


def _resize(
    x: Tensor,
    roi: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    over = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
    lengths = [x.shape[axis] for axis in over]
    if sizes:
        ratios = [new / old for new, old in zip(sizes, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            one = min(ratios) if keep_aspect_ratio_policy == "not_larger" else max(ratios)
            ratios, sizes = [one] * len(over), [math.floor(one * old + 0.5) for old in lengths]
    else:
        ratios = list(scales or ())
        sizes = [math.floor(old * ratio) for old, ratio in zip(lengths, ratios, strict=True)]
    whole = all(abs(old * r - new) < 1e-9 for old, r, new in zip(lengths, ratios, sizes, strict=True))
    usual = coordinate_transformation_mode in _HALF and whole and not antialias and min(sizes) > 1
    changed = [axis for axis, old, new in zip(over, lengths, sizes, strict=True) if old != new]
    if mode == "linear" and usual and not exclude_outside and 2 < x.dim() < 6 and all(i > 1 for i in changed):
        shape = list(x.shape)
        for axis, new in zip(over, sizes, strict=True):
            shape[axis] = new
        return F.interpolate(x, tuple(shape[2:]), mode=_LINEAR[x.dim() - 2], align_corners=False)
    y, outside = x, None
    for i, axis in enumerate(over):
        crop = coordinate_transformation_mode == "tf_crop_and_resize"
        if ratios[i] == 1 and sizes[i] == lengths[i] and not crop:
            continue
        part = (roi[i], roi[i + len(over)]) if crop and roi else (0.0, 1.0)
        at = _origins(lengths[i], sizes[i], ratios[i], coordinate_transformation_mode, part, x.device)
        if mode == "nearest":
            y = y.index_select(axis, _nearest(at, nearest_mode).long().clamp(0, lengths[i] - 1))
        else:
            stretch = min(ratios[i], 1.0) if antialias else 1.0
            cubic, outer = mode == "cubic", bool(exclude_outside)
            y = _along(y, axis, _weights(at, lengths[i], cubic, stretch, cubic_coeff_a, outer))
        if crop:
            out = ((at < 0) | (at > lengths[i] - 1)).reshape([-1 if j == axis else 1 for j in range(x.dim())])
            outside = out if outside is None else outside | out
    return y if outside is None else torch.where(outside, extrapolation_value, y)


def _resize_10(x: Tensor, scales: Sequence[float], *, mode: str = "nearest") -> Tensor:
    return _resize(
        x,
        None,
        scales,
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


TABLE: Table = {
    "Resize": (op(_resize_10, 1), op(_resize, 1, 2, 3, since=11)),
    "Upsample": op(_resize_10, 1),
}
