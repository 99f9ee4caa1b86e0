"""Images as samples: decoded, upright, without transparency, and preprocessed as stated."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.data.preprocess import Preprocess
from onnxopt.data.python import told
from onnxopt.errors import UsageError

__all__ = ["PREPROCESS_FILE", "Images", "image_files", "read_image"]

PREPROCESS_FILE = "preprocess.toml"
"""Beside the images, it states their preprocessing."""

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Images:
    """A folder of images, a sample each in the order of their names; serves models with one input.

    preprocess: None: `preprocess.toml` in the folder states it.
    """

    folder: str | os.PathLike[str]
    preprocess: Preprocess | None = None


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names."""
    if not folder.is_dir():
        raise UsageError(f"--data: {folder}: no such folder; --preprocess is for a folder of images")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def read_image(path: Path, preprocess: Preprocess) -> np.ndarray:
    """An image as an array of rank 3 (channels first or last, as `preprocess.layout` says).

    Pixels count from 0 to 255, those of 16 bits in fractions. The orientation that a camera noted is applied.

    Raises:
        UsageError: Pillow is missing, the file is no image, has transparent pixels and no background is
            stated, or is smaller than the crop.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UsageError("--data: reading images needs Pillow: pip install 'onnxopt[images]'") from None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UsageError(f"--data: {path}: not a readable image: {told(error)}") from error
    picture = _fit(_colors(picture, preprocess, path), preprocess, path)
    pixels = np.asarray(picture, np.float32)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 1 if preprocess.order == "gray" else 3, axis=2)
    if preprocess.order == "bgr":
        pixels = pixels[..., ::-1]
    array = (pixels * preprocess.scale - np.array(preprocess.mean)) / np.array(preprocess.std)
    dtype = np.dtype(preprocess.dtype)
    if dtype.kind in "iu":
        array = np.clip(np.rint(array), np.iinfo(dtype).min, np.iinfo(dtype).max)
    array = array.astype(dtype)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if preprocess.layout == "nchw" else array)


def _colors(picture: Any, preprocess: Preprocess, path: Path) -> Any:
    """The image in mode RGB, L (gray), or F where its gray has 16 bits."""
    from PIL import Image

    if picture.mode.startswith("I"):
        return Image.fromarray(np.asarray(picture, np.float32) / 257)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if preprocess.background is None and picture.getchannel("A").getextrema()[0] < 255:
            raise UsageError(f"--data: {path}: has transparent pixels; state what is behind: background=255")
        color = np.rint(np.broadcast_to(preprocess.background or 0, 3)).astype(int).tolist()
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*color, 255)), picture)
    gray = preprocess.order == "gray" or picture.mode in ("1", "L")
    return picture.convert("L" if gray else "RGB")


def _fit(picture: Any, preprocess: Preprocess, path: Path) -> Any:
    """The image resized, letterboxed or cropped; sides and offsets are rounded as torchvision does."""
    from PIL import Image

    def scaled(height: float, width: float) -> Any:
        size = (max(int(width), 1), max(int(height), 1))
        return picture.resize(size, Image.Resampling[preprocess.filter.upper()])

    width, height = picture.size
    if preprocess.letterbox is not None:
        tall, wide = preprocess.letterbox
        ratio = min(tall / height, wide / width)
        inner = scaled(round(height * ratio), round(width * ratio))
        left, top = (wide - inner.width) // 2, (tall - inner.height) // 2
        pad = (round(preprocess.pad),) * 3 if picture.mode == "RGB" else round(preprocess.pad)
        boxed = Image.new(picture.mode, (wide, tall), pad)
        boxed.paste(inner, (left, top) if preprocess.align == "center" else (0, 0))
        return boxed
    if isinstance(preprocess.resize, int):
        shorter = min(height, width)
        picture = scaled(preprocess.resize * height / shorter, preprocess.resize * width / shorter)
    elif preprocess.resize is not None:
        picture = scaled(*preprocess.resize)
    if preprocess.crop is None:
        return picture
    tall, wide = (int(side) for side in np.broadcast_to(preprocess.crop, 2))
    width, height = picture.size
    if tall > height or wide > width:
        raise UsageError(
            f"--data: {path}: is {height} x {width} where crop={tall}x{wide} is cut out; resize it first"
        )
    left, top = round((width - wide) / 2), round((height - tall) / 2)
    return picture.crop((left, top, left + wide, top + tall))
