"""Layers: convolution and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.calibration import windows
from onnxopt.training.interpreter.registry import Context, Table, op
from onnxopt.training.interpreter.statistics import Batches

__all__ = ["CONV", "TABLE", "conv", "flat", "padding"]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(
    auto_pad: str,
    pads: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Elements added before and after each axis."""
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    both = windows.padding(auto_pad, pads, sizes, extents, strides)
    return [begin for begin, _ in both], [end for _, end in both]


def flat(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """As `F.pad` wants it: the last axis first."""
    return [n for pair in zip(reversed(begins), reversed(ends), strict=True) for n in pair]


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = w.dim() - 2
    strides, dilations = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
    begins, ends = padding(auto_pad, pads, x.shape[2:], w.shape[2:], strides, dilations)
    if begins != ends:
        x, begins = F.pad(x, flat(begins, ends)), [0] * rank
    return CONV[rank](x, w, b, strides, tuple(begins), dilations, group)


def _conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """All that the kernel reaches, then cut (or padded) to what is asked for."""
    rank = w.dim() - 2
    strides, dilations = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
    extra = tuple(output_padding or (0,) * rank)
    full = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(x.shape[2:], strides, dilations, w.shape[2:], extra, strict=True)
    ]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        total = [n - wanted for n, wanted in zip(full, output_shape[-rank:], strict=True)]
        half = [n // 2 for n in total]
        rest = [n - h for n, h in zip(total, half, strict=True)]
        begins, ends = (half, rest) if auto_pad == "SAME_UPPER" else (rest, half)
    else:
        given = list(pads) if pads and auto_pad == "NOTSET" else [0] * (2 * rank)
        begins, ends = given[:rank], given[rank:]
    even = begins == ends and min(begins) >= 0
    if even and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        return _TRANSPOSED[rank](x, w, b, strides, tuple(begins), extra, group, dilations)
    y = _TRANSPOSED[rank](x, w, b, strides, 0, 0, group, dilations)
    after = [e - end for e, end in zip(extra, ends, strict=True)]
    filler = F.pad(y, flat([-n for n in begins], after))
    if b is None or max(after + [-n for n in begins]) <= 0:
        return filler
    inside = F.pad(torch.ones_like(y), flat([-n for n in begins], after))
    return filler + (1 - inside) * b.reshape(-1, *[1] * rank)


def _axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    batches: Batches | None = None,
) -> Any:
    if batches is not None and batches.on:
        return batches.normalize(x, (scale, bias, mean, var), epsilon, momentum)
    if not training_mode:
        if mean.dtype != x.dtype:
            mean, var = mean.to(x.dtype), var.to(x.dtype)
        return F.batch_norm(x, mean, var, scale.to(x.dtype), bias.to(x.dtype), False, 0.0, epsilon)
    over = (0, *_axes(x))
    now, spread = x.mean(over), x.var(over, unbiased=False)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return (
        y,
        (mean * momentum + now * (1 - momentum)),
        (var * momentum + spread * (1 - momentum)),
    )


def _layer_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    ctx: Context,
) -> Any:
    shape = tuple(x.shape[axis % x.dim() :])
    fits = all(one is None or tuple(one.shape) == shape for one in (scale, bias))
    if ctx.outputs < 2 and fits:
        return F.layer_norm(x, shape, scale, bias, epsilon)
    axes = tuple(range(axis % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    deviation = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    y = (x - mean) * deviation
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias), mean, deviation


def _rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    axes = tuple(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def _group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def _group_norm_18(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """Before version 21 scale and bias were by group."""
    each = x.shape[1] // num_groups
    wide = [v.repeat_interleave(each) if v.shape[0] == num_groups else v for v in (scale, bias)]
    return F.group_norm(x, num_groups, wide[0], wide[1], epsilon)


def _lrn(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    planes = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    padded = F.pad(planes, (0, 0, (size - 1) // 2, size // 2))
    total = F.avg_pool2d(padded, (size, 1), 1, divisor_override=1).reshape(x.shape)
    return x / (bias + alpha / size * total) ** beta


def _dropout(
    x: Tensor,
    ratio: Sequence[float] | float = 0.5,
    training_mode: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    rate = ratio if isinstance(ratio, float) else ratio[0] if ratio else 0.5
    if not (training_mode and training_mode[0]) or rate == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand_like(x) >= rate
    return x * mask / (1 - rate), mask


def _lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, 1, norm))


def _mean_variance(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    mean = x.mean(tuple(axes), keepdim=True)
    deviation = ((x * x).mean(tuple(axes), keepdim=True) - mean * mean).sqrt()
    return (x - mean) / (deviation + 1e-9)


TABLE: Table = {
    "BatchNormalization": op(_batch_norm),
    "Conv": op(conv),
    "ConvTranspose": op(_conv_transpose),
    "Dropout": op(_dropout, 1, 2),
    "GlobalAveragePool": op(lambda x: x.mean(_axes(x), keepdim=True)),
    "GlobalLpPool": op(lambda x, *, p=2: torch.linalg.vector_norm(x, p, _axes(x), True)),
    "GlobalMaxPool": op(lambda x: x.amax(_axes(x), keepdim=True)),
    "GroupNormalization": (op(_group_norm_18, since=18), op(_group_norm, since=21)),
    "InstanceNormalization": op(_instance_norm),
    "LayerNormalization": op(_layer_norm),
    "LRN": op(_lrn),
    "LpNormalization": op(_lp_normalization),
    "MeanVarianceNormalization": op(_mean_variance),
    "RMSNormalization": op(_rms_norm),
}
