"""What a layer multiplies its weight with, as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from onnxopt.graph import constant_of, int_attr, ints_attr, sizes_of, str_attr

__all__ = [
    "from_rows",
    "has_rows",
    "operand_rows",
    "padding",
    "pads_of",
    "result_rows",
    "summands_of",
    "weight_rows",
]


def has_rows(node: ir.Node) -> bool:
    """Whether this is a Conv, Gemm or MatMul whose second operand alone is constant; of MatMul, a matrix.

    Or a ConvTranspose with pads that are given, no larger than its kernel.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return False
    if constant_of(node.inputs[0]) is not None:
        return False
    tensor = constant_of(node.inputs[1])
    if tensor is None or node.op_type != "ConvTranspose":
        return tensor is not None and (node.op_type == "Conv" or len(sizes_of(tensor)) == 2)
    given = str_attr(node, "auto_pad", "NOTSET") == "NOTSET" and not ints_attr(node, "output_shape")
    return given and max(ints_attr(node, "pads") or (0,)) < min(sizes_of(tensor)[2:])


def weight_rows(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """The second operand of a layer that has rows as [groups, channels of a group, summands]."""
    group = int_attr(node, "group", 1)
    if node.op_type == "Conv":
        return weight.reshape(group, len(weight) // group, -1)
    if node.op_type == "ConvTranspose":
        parts = weight.reshape(group, len(weight) // group, *weight.shape[1:])
        return parts.swapaxes(1, 2).reshape(group, weight.shape[1], -1)
    return (weight if int_attr(node, "transB", 0) else weight.T)[None]


def summands_of(node: ir.Node) -> int:
    """How many products a layer that has rows adds up for an element of its result."""
    tensor = constant_of(node.inputs[1])
    assert tensor is not None  # it has rows
    return int(weight_rows(node, np.broadcast_to(np.float32(0), sizes_of(tensor))).shape[2])


def from_rows(node: ir.Node, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The operand of this shape that `weight_rows` makes these rows of."""
    if node.op_type == "ConvTranspose":
        parts = rows.reshape(len(rows), shape[1], shape[0] // len(rows), *shape[2:])
        return np.asarray(parts.swapaxes(1, 2).reshape(shape))
    plain = node.op_type == "Conv" or int_attr(node, "transB", 0)
    return rows.reshape(shape) if plain else np.ascontiguousarray(rows[0].T)


def operand_rows(node: ir.Node, array: np.ndarray, kernel: tuple[int, ...], most: int) -> np.ndarray:
    """The first operand as [positions, groups, summands], of at most so many of its positions.

    Args:
        node: that has rows, without transA.
        array: the operand.
        kernel: the spatial sizes of a convolution's weight.
        most: positions to take; where there are more, always the same random ones.
    """
    if "Conv" not in node.op_type:
        rows = array.reshape(-1, array.shape[-1])
        return rows[_some(len(rows), most), None]
    windows = _windows(node, array, kernel)
    batch, _, *places = windows.shape[: 2 + len(kernel)]
    which: tuple[np.ndarray, ...] = np.unravel_index(_some(batch * math.prod(places), most), (batch, *places))
    found = np.moveaxis(windows, 1, -1 - len(kernel))[which]
    return np.asarray(found).reshape(len(found), int_attr(node, "group", 1), -1)


def result_rows(node: ir.Node, array: np.ndarray, most: int) -> np.ndarray:
    """What a node writes where `operand_rows` takes what it reads: [positions, channels]."""
    rows = np.moveaxis(array, 1, -1) if "Conv" in node.op_type else array
    rows = rows.reshape(-1, rows.shape[-1])
    return np.asarray(rows[_some(len(rows), most)])


def _some(count: int, most: int) -> np.ndarray:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _windows(node: ir.Node, array: np.ndarray, kernel: tuple[int, ...]) -> np.ndarray:
    """[batch, channels, *places, *kernel], not copied out of the padded array."""
    ones = (1,) * len(kernel)
    strides, dilations = ints_attr(node, "strides") or ones, ints_attr(node, "dilations") or ones
    extents = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    if node.op_type == "ConvTranspose":
        array = _spread(node, array, extents, strides)
        found = sliding_window_view(array, extents, axis=tuple(range(2, array.ndim)))
        return found[(slice(None),) * array.ndim + tuple(slice(None, None, -step) for step in dilations)]
    pads = pads_of(node, array.shape[2:], extents, strides)
    padded = np.pad(array, ((0, 0), (0, 0), *pads))
    found = sliding_window_view(padded, extents, axis=tuple(range(2, array.ndim)))
    steps = tuple(slice(None, None, step) for step in (*strides, *dilations))
    return found[(slice(None), slice(None), *steps)]


def _spread(
    node: ir.Node, array: np.ndarray, extents: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """What a ConvTranspose reads, with zeros in between and around."""
    rank, sizes = len(extents), array.shape[2:]
    spread = tuple((size - 1) * step + 1 for size, step in zip(sizes, strides, strict=True))
    wide = np.zeros((*array.shape[:2], *spread), array.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in strides))] = array
    pads = ints_attr(node, "pads") or (0,) * (2 * rank)
    more = ints_attr(node, "output_padding") or (0,) * rank
    front = [(extent - 1 - pad) for extent, pad in zip(extents, pads, strict=False)]
    back = [e - 1 - pad + m for e, pad, m in zip(extents, pads[rank:], more, strict=True)]
    return np.pad(wide, ((0, 0), (0, 0), *zip(front, back, strict=True)))


def pads_of(
    node: ir.Node, sizes: tuple[int, ...], extents: tuple[int, ...], strides: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Of each spatial axis of a Conv, what is put in front and behind.

    Args:
        node: Conv.
        sizes: of the input; they matter only where `auto_pad` is SAME and strides are above 1.
        extents: of the kernel, dilated.
        strides: of the Conv.
    """
    return padding(str_attr(node, "auto_pad", "NOTSET"), ints_attr(node, "pads"), sizes, extents, strides)


def padding(
    mode: str,
    pads: Sequence[int] | None,
    sizes: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """What a window puts in front of and behind each axis; `mode` is its attribute auto_pad."""
    rank = len(extents)
    if mode in ("NOTSET", "VALID"):
        given = tuple(pads or ()) if mode == "NOTSET" else ()
        given = given or (0,) * (2 * rank)
        return list(zip(given[:rank], given[rank:], strict=True))
    whole = [max((-(-n // s) - 1) * s + e - n, 0) for n, e, s in zip(sizes, extents, strides, strict=True)]
    less = [(total // 2, total - total // 2) for total in whole]
    return less if mode == "SAME_UPPER" else [(more, fewer) for fewer, more in less]
