"""Operators of ONNX Runtime's own domain that passes emit, and of ai.onnx.ml that only choose and scale.

Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.ops.attention import attend, merged, split_heads
from onnxopt.training.interpreter.ops.math import gemm
from onnxopt.training.interpreter.ops.nn import conv
from onnxopt.training.interpreter.registry import Operator, Table, op

__all__ = ["TABLE"]

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Clip": lambda x, low, high: x.clamp(low, high),
    "HardSigmoid": lambda x, a, b: (a * x + b).clamp(0, 1),
    "LeakyRelu": F.leaky_relu,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def _fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **attributes: Any,
) -> Tensor:
    y = conv(x, w, b, **{name: value for name, value in attributes.items() if name != "kernel_shape"})
    return _ACTIVATIONS[activation](y if z is None else y + z, *activation_params)


def _fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    **attributes: Any,
) -> Tensor:
    numbers = [n for n in (activation_alpha, activation_beta, activation_gamma) if n is not None]
    return _ACTIVATIONS[activation](gemm(a, b, c, **attributes), *numbers)


def _turned(x: Tensor, last: int, batch: int) -> Tensor:
    x = x.movedim(0, -2) if batch else x
    return x.transpose(-1, -2) if last else x


def _fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803 - ORT's own names
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Tensor:
    y = torch.matmul(_turned(a, transA, transBatchA), _turned(b, transB, transBatchB))
    return y if alpha == 1 else alpha * y


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _skip_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Any, ...]:
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), None, None, total


def _skip_rms(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Any, ...]:
    total = x + skip if bias is None else x + skip + bias
    return _simplified(total, gamma, epsilon=epsilon)[0], None, None, total


def _simplified(x: Tensor, gamma: Tensor, *, axis: int = -1, epsilon: float = 1e-5) -> tuple[Tensor, ...]:
    axes = tuple(range(axis % x.dim(), x.dim()))
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    return x * inverse * gamma, inverse


def _embed_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Any, ...]:
    at = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions.long()
    total = F.embedding(ids.long(), words) + F.embedding(at, places)
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments.long(), kinds)
    counts = ids.new_zeros(ids.shape[0]) if mask is None else mask.sum(1)
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), counts.int(), total


def _padding(mask: Tensor | None, batch: int, columns: int, like: Tensor, value: float) -> Tensor | None:
    """What is added to the scores for a mask by key: 2-D or 3-D of 0 and 1, or 1-D lengths."""
    if mask is None:
        return None
    if mask.dim() == 1:
        at = torch.arange(columns, device=mask.device)
        allowed = at < mask[:batch].unsqueeze(1)
        if mask.numel() == 2 * batch:
            allowed = allowed & (at >= mask[batch:].unsqueeze(1))
        allowed = allowed.reshape(batch, 1, 1, columns)
    else:
        allowed = mask.bool().reshape(batch, 1, -1 if mask.dim() == 3 else 1, mask.shape[-1])
    return torch.zeros((), dtype=like.dtype, device=like.device).where(allowed, value)


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    past: Sequence[Tensor],
    unidirectional: int,
    scale: float | None,
    value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if past:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    rows, columns = q.shape[2], k.shape[2]
    parts = [_padding(mask, q.shape[0], columns, q, value), bias]
    if unidirectional:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        parts.append(torch.zeros((), dtype=q.dtype, device=q.device).where(allowed, value))
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return merged(attend(q, k, v, total, scale or None)), k, v


def _multi_head_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    if k is None:  # packed: [batch, length, heads, 3, size]
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif v is None:  # packed: [batch, length, heads, 2, size]
        k, v = (part.flatten(2) for part in k.unbind(3))
    if bias is not None:
        sizes = [q.shape[-1], k.shape[-1], v.shape[-1]]
        if k.dim() == 4:
            q = q + bias[: sizes[0]]
        else:
            q, k, v = (one + part for one, part in zip((q, k, v), bias.split(sizes), strict=True))
    q, k, v = (one if one.dim() == 4 else split_heads(one, num_heads) for one in (q, k, v))
    past = [one for one in (past_key, past_value) if one is not None]
    return _attended(q, k, v, mask, scores, past, unidirectional, scale, mask_filter_value)


def _attention(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    scores: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    y = F.linear(x, w.t(), b)
    sizes = list(qkv_hidden_sizes or [w.shape[1] // 3] * 3)
    q, k, v = (split_heads(part, num_heads) for part in y.split(sizes, -1))
    before = list(past.unbind(0)) if past is not None else []
    found, k, v = _attended(q, k, v, mask, scores, before, unidirectional, scale, mask_filter_value)
    return found, torch.stack((k, v))


def _matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    _: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803 - ORT's own names
    N: int,  # noqa: N803
    bits: int = 4,
    block_size: int,
) -> Tensor:
    blocks = math.ceil(K / block_size)
    steps = _unpacked(packed.reshape(N, -1), bits).reshape(N, blocks, -1)[..., :block_size].to(scales.dtype)
    if zeros is None:
        middle: Tensor | float = float(1 << (bits - 1))
    elif zeros.dtype.is_floating_point:
        middle = zeros.reshape(N, blocks, 1)
    else:
        middle = _unpacked(zeros.reshape(N, -1), bits)[:, :blocks].unsqueeze(-1).to(scales.dtype)
    weight = ((steps - middle) * scales.reshape(N, blocks, 1)).reshape(N, -1)[:, :K]
    return F.linear(x, weight.to(x.dtype), bias)


def _unpacked(x: Tensor, bits: int) -> Tensor:
    """Numbers of `bits` in the bytes of each row, the lower ones first."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return ((x.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _scaler(x: Tensor, *, offset: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> Tensor:
    wide = x.to(torch.float32) if not x.dtype.is_floating_point else x
    return (wide - wide.new_tensor(offset)) * wide.new_tensor(scale)


def _chosen(x: Tensor, at: Tensor) -> Tensor:
    return x.reshape(1, -1)[:, at.reshape(-1)] if x.dim() == 1 else x.index_select(-1, at.reshape(-1))


def _ms(**operators: Callable[..., Any]) -> dict[str, Operator]:
    return {f"com.microsoft::{name}": op(run) for name, run in operators.items()}


TABLE: Table = {
    **_ms(
        Attention=_attention,
        BiasGelu=_bias_gelu,
        EmbedLayerNormalization=_embed_norm,
        FastGelu=_fast_gelu,
        FusedConv=_fused_conv,
        FusedGemm=_fused_gemm,
        FusedMatMul=_fused_matmul,
        Gelu=F.gelu,
        MatMulNBits=_matmul_nbits,
        MultiHeadAttention=_multi_head_attention,
        QuickGelu=_quick_gelu,
        SkipLayerNormalization=_skip_norm,
        SkipSimplifiedLayerNormalization=_skip_rms,
    ),
    "SimplifiedLayerNormalization": op(_simplified),
    "ai.onnx.ml::ArrayFeatureExtractor": op(_chosen),
    "ai.onnx.ml::Binarizer": op(lambda x, *, threshold=0.0: (x > threshold).to(x.dtype)),
    "ai.onnx.ml::Scaler": op(_scaler),
}
