"""Attention, with rows that may attend to nothing: their result and their gradients are zero."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor

from onnxopt.training.interpreter.registry import Context, Table, op
from onnxopt.training.interpreter.values import CARRIERS

__all__ = ["TABLE", "attend", "merged", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * size] as [batch, heads, length, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[batch, heads, length, size] as [batch, length, heads * size]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _weights(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of each row; of a row that is masked as a whole, zeros."""
    if bias is None:
        return torch.softmax(scores, -1)
    dead = torch.isneginf(bias.amax(-1, keepdim=True))
    found = torch.softmax(torch.where(dead, scores, scores + bias), -1)
    return torch.where(dead, 0, found)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v for [batch, heads, length, size]; bias: what is added to the scores.

    `scale` is 1 / sqrt(size) by default.
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return _weights(scores, bias) @ v


def _infinite(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).where(allowed, -math.inf)


def _bias(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    past: int,
    lengths: Tensor | None,
    causal: int,
    left: int,
    right: int,
) -> Tensor | None:
    """All that is added to the scores, or None."""
    rows, columns = q.shape[2], k.shape[2]
    bias: Tensor | None = None
    if mask is not None:
        missing = columns - mask.shape[-1]
        if missing > 0:
            mask = F.pad(mask, (0, missing), value=False if mask.dtype == torch.bool else -math.inf)
        bias = _infinite(mask, q) if mask.dtype == torch.bool else mask.to(q.dtype)
    if not (causal or left >= 0 or right >= 0 or lengths is not None):
        return bias
    at = torch.arange(columns, device=q.device)
    here = torch.arange(rows, device=q.device).unsqueeze(1) + past
    if lengths is not None:
        here = here + (lengths.reshape(-1, 1, 1, 1) - rows if not past else 0)
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (at <= here)
    if left >= 0:
        allowed = allowed & (here - at <= left)
    if right >= 0:
        allowed = allowed & (at - here <= right)
    if lengths is not None:
        allowed = allowed & (at < lengths.reshape(-1, 1, 1, 1))
    return _infinite(allowed, q) if bias is None else bias + _infinite(allowed, q)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    ctx: Context,
) -> Any:
    flat = q.dim() == 3
    if q_num_heads and kv_num_heads and flat:
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    present = (k, v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    bias = _bias(q, k, mask, past, lengths, is_causal, left_window_size, right_window_size)
    if ctx.outputs < 4 and not softcap and q.dtype in (torch.float32, torch.float64):
        y = attend(q, k, v, bias, scale)
        return (merged(y) if flat else y), *present
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    factor = torch.tensor(root, dtype=q.dtype).item()
    shown = [(q * factor) @ (k * factor).transpose(-1, -2)]
    shown.append(torch.tanh(shown[0] / softcap) * softcap if softcap else shown[0])
    shown.append(shown[1] if bias is None else shown[1] + bias)
    kind = q.dtype if softmax_precision is None else CARRIERS[ir.DataType(softmax_precision)]
    shown.append(_weights(shown[1].to(kind), None if bias is None else bias.to(kind)).to(q.dtype))
    y = shown[3] @ v
    return (merged(y) if flat else y), *present, shown[qk_matmul_output_mode]


TABLE: Table = {"Attention": op(_attention, host=False)}
