"""How MatMulNBits of com.microsoft stores weights: unsigned, by output channel, two 4-bit numbers a byte.

Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import numpy as np

from onnxopt.quantization.formats import Format

__all__ = ["BLOCKS", "packed"]

BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks that it takes."""


def packed(numbers: np.ndarray, form: Format, block: int = 0) -> np.ndarray:
    """Integers of 4 or 8 bits `[N, K]` as uint8 `[N, bytes]`, or `[N, blocks, bytes]`; zeros fill the end.

    Signed numbers are moved up to be unsigned; the lower half of a byte comes first.
    """
    whole: np.ndarray = (numbers.astype(np.int32) - int(form.low)).astype(np.uint8)
    rows, size = whole.shape
    whole = np.pad(whole, ((0, 0), (0, -size % (block or 8 // form.bits))))
    if form.bits == 4:
        whole = whole[:, ::2] | whole[:, 1::2] << 4
    return whole.reshape(rows, -1, block * form.bits // 8) if block else whole
