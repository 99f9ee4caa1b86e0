"""What a layer multiplies its weight with, as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from onnxopt.graph import constant_of, int_attr, ints_attr, sizes_of, str_attr

__all__ = ["from_rows", "has_rows", "operand_rows", "padding", "pads_of", "result_rows", "weight_rows"]


def has_rows(node: ir.Node) -> bool:
    """Whether this is a Conv, Gemm or MatMul whose second operand is a constant; of MatMul, a matrix."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return False
    tensor = constant_of(node.inputs[1])
    return tensor is not None and (node.op_type == "Conv" or len(sizes_of(tensor)) == 2)


def weight_rows(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """The second operand of a Conv, Gemm or MatMul as [groups, channels of a group, summands]."""
    if node.op_type == "Conv":
        group = int_attr(node, "group", 1)
        return weight.reshape(group, len(weight) // group, -1)
    return (weight if int_attr(node, "transB", 0) else weight.T)[None]


def from_rows(node: ir.Node, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The operand of this shape that `weight_rows` makes these rows of."""
    plain = node.op_type == "Conv" or int_attr(node, "transB", 0)
    return rows.reshape(shape) if plain else np.ascontiguousarray(rows[0].T)


def operand_rows(node: ir.Node, array: np.ndarray, kernel: tuple[int, ...], most: int) -> np.ndarray:
    """The first operand as [positions, groups, summands], of at most so many of its positions.

    Args:
        node: Conv, Gemm without transA, or MatMul.
        array: the operand.
        kernel: the spatial sizes of a Conv's weight.
        most: positions to take; where there are more, always the same random ones.
    """
    if node.op_type != "Conv":
        rows = array.reshape(-1, array.shape[-1])
        return rows[_some(len(rows), most), None]
    windows = _windows(node, array, kernel)
    batch, _, *places = windows.shape[: 2 + len(kernel)]
    which: tuple[np.ndarray, ...] = np.unravel_index(_some(batch * math.prod(places), most), (batch, *places))
    found = np.moveaxis(windows, 1, -1 - len(kernel))[which]
    return np.asarray(found).reshape(len(found), int_attr(node, "group", 1), -1)


def result_rows(node: ir.Node, array: np.ndarray, most: int) -> np.ndarray:
    """What a node writes where `operand_rows` takes what it reads: [positions, channels]."""
    rows = np.moveaxis(array, 1, -1) if node.op_type == "Conv" else array
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
    pads = pads_of(node, array.shape[2:], extents, strides)
    padded = np.pad(array, ((0, 0), (0, 0), *pads))
    found = sliding_window_view(padded, extents, axis=tuple(range(2, array.ndim)))
    steps = tuple(slice(None, None, step) for step in (*strides, *dilations))
    return found[(slice(None), slice(None), *steps)]


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
