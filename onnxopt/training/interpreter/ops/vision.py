"""Sampling at positions that are data, boxes, and signals as frequencies."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.registry import Table, op

__all__ = ["TABLE"]

_SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}


def _grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    return F.grid_sample(x, grid, _SAMPLING.get(mode, mode), padding_mode, bool(align_corners))


def _neighbours(planes: Tensor, y: Tensor, x: Tensor) -> Iterator[Tensor]:
    """[channels, ...]: the four elements around places in planes of [channels, height, width], times how near
    they are; nothing lies outside."""
    height, width = planes.shape[1:]
    low_y, low_x = torch.floor(y), torch.floor(x)
    for at_y, part_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
        for at_x, part_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            found = planes[:, at_y.long().clamp(0, height - 1), at_x.long().clamp(0, width - 1)]
            yield torch.where(inside, part_y * part_x, 0) * found


def _sampled(planes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Planes between their elements."""
    return functools.reduce(torch.add, _neighbours(planes, y, x))


def _deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
    offset_group: int = 1,
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
) -> Tensor:
    """Each tap of the kernel reads where its offset points, then it is a product."""
    n, channels = x.shape[:2]
    kh, kw = w.shape[2:]
    oh, ow = offset.shape[2:]
    shifts = offset.reshape(n, offset_group, kh, kw, 2, oh, ow)
    ys = (torch.arange(oh, device=x.device) * strides[0] - pads[0]).reshape(1, 1, oh, 1)
    xs = (torch.arange(ow, device=x.device) * strides[1] - pads[1]).reshape(1, 1, 1, ow)
    ys = ys + (torch.arange(kh, device=x.device) * dilations[0]).reshape(kh, 1, 1, 1)
    xs = xs + (torch.arange(kw, device=x.device) * dilations[1]).reshape(1, kw, 1, 1)
    each = channels // offset_group
    rows = []
    for i in range(n):
        parts = []
        for g in range(offset_group):
            planes = x[i, g * each : (g + 1) * each]
            found = _sampled(planes, ys + shifts[i, g, :, :, 0], xs + shifts[i, g, :, :, 1])
            parts.append(found if mask is None else found * mask.reshape(n, -1, kh, kw, oh, ow)[i, g])
        rows.append(torch.cat(parts))
    columns = torch.stack(rows).reshape(n, group, -1, oh * ow)
    y = torch.einsum("gok,ngkp->ngop", w.reshape(group, w.shape[0] // group, -1), columns)
    y = y.reshape(n, -1, oh, ow)
    return y if b is None else y + b.reshape(-1, 1, 1)


def _roi_align(
    x: Tensor,
    rois: Tensor,
    batches: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    shift = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    height, width = x.shape[2:]
    rows = []
    for box, batch in zip(rois, batches.tolist(), strict=True):
        x1, y1, x2, y2 = (box * spatial_scale - shift).unbind()
        h, w = y2 - y1, x2 - x1
        if not shift:
            h, w = h.clamp(min=1), w.clamp(min=1)
        ny = sampling_ratio or math.ceil(h.item() / output_height)
        nx = sampling_ratio or math.ceil(w.item() / output_width)
        steps_y = (torch.arange(output_height * ny, dtype=x.dtype, device=x.device) + 0.5) / ny
        steps_x = (torch.arange(output_width * nx, dtype=x.dtype, device=x.device) + 0.5) / nx
        ys, xs = y1 + steps_y * (h / output_height), x1 + steps_x * (w / output_width)
        inside = ((ys >= -1) & (ys <= height)).unsqueeze(1) & ((xs >= -1) & (xs <= width))
        grid_y = ys.clamp(0, height - 1).unsqueeze(1).expand(-1, len(xs))
        grid_x = xs.clamp(0, width - 1).expand(len(ys), -1)
        if mode == "max":
            # as the standard has it: the largest of the weighted neighbours of all samples
            found = functools.reduce(torch.maximum, _neighbours(x[batch], grid_y, grid_x))
            rows.append(F.max_pool2d(torch.where(inside, found, 0), (ny, nx)))
            continue
        found = torch.where(inside, _sampled(x[batch], grid_y, grid_x), 0)
        rows.append(F.avg_pool2d(found, (ny, nx)))
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], output_height, output_width)


def _max_unpool(
    x: Tensor,
    indices: Tensor,
    shape: Sequence[int] | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    steps, edges = strides or [1] * rank, pads or [0] * (2 * rank)
    sizes = [
        (n - 1) * s - edges[i] - edges[i + rank] + k
        for i, (n, s, k) in enumerate(zip(x.shape[2:], steps, kernel_shape, strict=True))
    ]
    full = (*x.shape[:2], *sizes)
    flat = x.new_zeros(math.prod(full)).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(full)
    if shape is None:
        return flat
    return F.pad(flat, [n for a, b in zip(reversed(full), reversed(shape), strict=True) for n in (0, b - a)])


def _col2im(
    x: Tensor,
    image: Sequence[int],
    block: Sequence[int],
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(image)
    gaps, edges, steps = dilations or [1] * rank, pads or [0] * (2 * rank), strides or [1] * rank
    whole = [n + edges[i] + edges[i + rank] for i, n in enumerate(image)]
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(whole, gaps, block, steps, strict=True)]
    at = torch.zeros(1, dtype=torch.long, device=x.device)
    for i in range(rank):
        one = torch.arange(block[i], device=x.device) * gaps[i]
        places = one.unsqueeze(1) + torch.arange(counts[i], device=x.device) * steps[i]
        view = [1] * (2 * rank)
        view[i], view[i + rank] = block[i], counts[i]
        at = at * whole[i] + places.reshape(view)
    channels = x.shape[1] // math.prod(block)
    parts = x.reshape(x.shape[0], channels, -1)
    found = x.new_zeros(x.shape[0], channels, math.prod(whole))
    found = found.scatter_add(2, at.reshape(1, 1, -1).expand(parts.shape), parts)
    found = found.reshape(x.shape[0], channels, *whole)
    for i, n in enumerate(image):
        found = found.narrow(2 + i, edges[i], n)
    return found


def _dft(
    x: Tensor,
    length: Sequence[int] | None = None,
    axis: Sequence[int] | int = -2,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    at = axis if isinstance(axis, int) else axis[0] if axis else -2
    at = at % x.dim()
    count = length[0] if length else None
    if inverse and onesided:
        size = count or 2 * (x.shape[at] - 1)
        return torch.fft.irfft(torch.view_as_complex(x.contiguous()), size, at).unsqueeze(-1)
    wide = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    if onesided:
        return torch.view_as_real(torch.fft.rfft(wide, count, at))
    return torch.view_as_real((torch.fft.ifft if inverse else torch.fft.fft)(wide, count, at))


def _stft(
    x: Tensor,
    step: Sequence[int],
    window: Tensor | None = None,
    length: Sequence[int] | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    size = length[0] if length else window.shape[0] if window is not None else x.shape[1]
    wide = torch.view_as_complex(x.contiguous()) if x.dim() == 3 and x.shape[-1] == 2 else x
    wide = wide.squeeze(-1) if wide.dim() == 3 else wide
    frames = wide.unfold(1, size, step[0])
    frames = frames if window is None else frames * window
    return torch.view_as_real(torch.fft.rfft(frames) if onesided else torch.fft.fft(frames))


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    most: Sequence[int] | None = None,
    overlap: Sequence[float] | None = None,
    least: Sequence[float] | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    limit, allowed = (most[0] if most else 0), (overlap[0] if overlap else 0.0)
    a, b = boxes[..., :2], boxes[..., 2:]
    low, high = (a - b / 2, a + b / 2) if center_point_box else (torch.minimum(a, b), torch.maximum(a, b))
    found: list[list[int]] = []
    for batch in range(scores.shape[0]):
        begins, ends = low[batch], high[batch]
        area = (ends - begins).prod(-1)
        for kind, row in enumerate(scores[batch]):
            kept: list[int] = []
            for i in torch.sort(row, descending=True, stable=True).indices.tolist():
                if len(kept) >= limit or (least and row[i] <= least[0]):
                    break
                sides = torch.minimum(ends[i], ends[kept]) - torch.maximum(begins[i], begins[kept])
                common = sides.clamp(min=0).prod(-1)
                if not bool((common / (area[i] + area[kept] - common) > allowed).any()):
                    kept.append(i)
            found += [[batch, kind, i] for i in kept]
    return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


TABLE: Table = {
    "Col2Im": op(_col2im, 1, 2),
    "DFT": op(_dft, 1, 2),
    "DeformConv": op(_deform_conv),
    "GridSample": op(_grid_sample),
    "MaxUnpool": op(_max_unpool, 2),
    "NonMaxSuppression": op(_suppress, 2, 3, 4),
    "RoiAlign": op(_roi_align),
    "STFT": op(_stft, 1, 3),
}
