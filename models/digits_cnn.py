"""A small trained CNN for 8x8 digits, and the data it was trained on.

The digits are synthetic: a 5x7 bitmap font, shifted, rotated, scaled and sampled to 8x8 pixels with noise and
a random intensity. No handwriting and no public dataset is in them, so an accuracy on them says whether a
rewrite or a quantization kept the model's function, and nothing about reading real digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

PATH = Path(__file__).with_name("digits_cnn.onnx")
"""Written by `train_digits.py`: three Conv-BatchNormalization-Relu blocks, unfused, Flatten and Gemm."""

_FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
GLYPHS = np.array([[[int(c) for c in row] for row in glyph.split()] for glyph in _FONT], np.float32)


def digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw labelled digits.

    Returns:
        images, float32 (count, 1, 8, 8), from about -0.6 to 1.5; labels, int64 (count,), 0 to 9.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    angle = rng.normal(0, 0.12, (count, 1, 1))
    scale = rng.uniform(0.85, 1.15, (count, 1, 1))
    shift = rng.uniform(-1, 1, (2, count, 1, 1))
    rows, columns = np.mgrid[:8, :8] - 3.5
    y = (np.cos(angle) * rows - np.sin(angle) * columns) / scale + shift[0] + 3
    x = (np.sin(angle) * rows + np.cos(angle) * columns) / scale + shift[1] + 2
    images = _sample(labels, y, x) * rng.uniform(0.6, 1.0, (count, 1, 1)) + rng.normal(0, 0.13, (count, 8, 8))
    return images[:, None].astype(np.float32), labels.astype(np.int64)


def _sample(labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values of each label's glyph at (y, x), zero outside it."""
    glyphs = np.pad(GLYPHS, ((0, 0), (3, 3), (3, 3)))[labels]
    y, x = np.clip(y + 3, 0, 11.99), np.clip(x + 3, 0, 9.99)
    top, left = y.astype(np.int64), x.astype(np.int64)
    down, right = y - top, x - left
    image = np.arange(len(labels))[:, None, None]
    upper = glyphs[image, top, left] * (1 - right) + glyphs[image, top, left + 1] * right
    lower = glyphs[image, top + 1, left] * (1 - right) + glyphs[image, top + 1, left + 1] * right
    sampled: np.ndarray = upper * (1 - down) + lower * down
    return sampled


def digits_cnn() -> onnx.ModelProto:
    """The trained model: ``image`` float32 (batch, 1, 8, 8) to ``logits`` float32 (batch, 10)."""
    return onnx.load(PATH)
