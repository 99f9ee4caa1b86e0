"""What is done to an image before a model sees it, stated: nothing of it can be read off the model.

    resize=256,crop=224,order=rgb,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225

The same as TOML, in a file of its own or in the table `preprocess` of one:

    resize = 256
    crop = 224
    scale = "1/255"
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]

Sizes are height x width, as in `resize=480x640`.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.synthesis.inputs import Input

__all__ = ["Preprocess", "example_for", "read_preprocess"]

Size = tuple[int, int]
"""Height and width in pixels."""
Order = Literal["rgb", "bgr", "gray"]
Layout = Literal["nchw", "nhwc"]
Align = Literal["center", "corner"]
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]

_WORDS = {"order": Order, "layout": Layout, "align": Align, "filter": Filter}
_DTYPES = ("float32", "float16", "float64", "uint8", "int8", "uint16", "int32", "int64")


@dataclass(frozen=True)
class Preprocess:
    """Steps from an image file to an array, in the order of the fields.

    resize: the length of the shorter side, the other one in proportion, or a size to stretch to.
    letterbox: a size to fit into, in proportion; `pad` (0 to 255) fills the rest, on both sides or, with
    align="corner", at the bottom and on the right. crop: a size to cut out of the middle; an int is a square.
    filter: how pixels are resampled. background: the color (0 to 255, in RGB) behind transparent pixels;
    without it an image that has any is refused. order: of the channels; gray is ITU-R 601 luma.
    scale, mean, std: (pixel * scale - mean) / std, for each channel in `order` or the same for all.
    dtype: of the array; integers are rounded and clipped. layout: of the array, whose batch is 1.

    Raises:
        UsageError: values that contradict each other.
    """

    resize: int | Size | None = None
    letterbox: Size | None = None
    pad: float = 0
    align: Align = "center"
    crop: int | Size | None = None
    filter: Filter = "bilinear"
    background: tuple[float, ...] | None = None
    order: Order = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    layout: Layout = "nchw"

    def __post_init__(self) -> None:
        channels = 1 if self.order == "gray" else 3
        for name, known in (*((name, get_args(kind)) for name, kind in _WORDS.items()), ("dtype", _DTYPES)):
            word = getattr(self, name)
            if word not in known:
                raise UsageError(f"preprocess: unknown {name} {word!r}{did_you_mean(str(word), known)}")
        for name, count in (("mean", channels), ("std", channels), ("background", 3)):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) not in (1, count):
                raise UsageError(f"preprocess: {name} takes one number or {count}, found {len(numbers)}")
        if any(np.min(size) < 1 for size in (self.resize, self.letterbox, self.crop) if size is not None):
            raise UsageError("preprocess: sizes are positive")
        if self.letterbox and (self.resize or self.crop):
            raise UsageError("preprocess: letterbox is instead of resize and crop")
        if 0 in self.std or not np.isfinite([self.scale, self.pad, *self.mean, *self.std]).all():
            raise UsageError("preprocess: scale, pad, mean and std are finite, and std is not 0")


def read_preprocess(spec: str | os.PathLike[str]) -> Preprocess:
    """The preprocessing that a text such as ``resize=224,scale=1/255`` or a ``.toml`` file states.

    Raises:
        UsageError: no such file, no TOML, an unknown word, or a value that cannot be read.
    """
    text = os.fspath(spec)
    if text.endswith(".toml"):
        return _built(_table(Path(spec)), text)
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"--preprocess: expected key=value, found {part!r}")
        if key in given:
            raise UsageError(f"--preprocess: {key!r} is given twice")
        given[key] = value
    return _built(given, "--preprocess")


def example_for(item: Input) -> str:
    """A preprocessing that gives arrays this input takes; its numbers are for the user to correct."""
    dims = item.dims or (1, 3, 224, 224)
    last = len(dims) - 1
    nhwc = dims[last] in (1, 3) and dims[max(last - 2, 0)] not in (1, 3)
    image = dims[-3:-1] if nhwc else dims[-2:]
    size = "x".join(str(dim) if isinstance(dim, int) else "224" for dim in image)
    parts = [f"resize={size}", "order=gray" if dims[last if nhwc else last - 2] == 1 else "order=rgb"]
    parts += ["layout=nhwc"] * nhwc
    parts += ["scale=1/255"] if item.dtype == np.float32 else [f"dtype={item.dtype}"]
    return ",".join(parts)


def _table(path: Path) -> Mapping[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # tomllib's own and UnicodeDecodeError
        raise UsageError(f"{path}: not TOML: {error}") from None
    inner = table.get("preprocess", table)
    if not isinstance(inner, dict):
        raise UsageError(f'{path}: expected a table: [preprocess] with resize = 224, scale = "1/255", ...')
    return inner


def _built(given: Mapping[str, Any], who: str) -> Preprocess:
    known = [field.name for field in dataclasses.fields(Preprocess)]
    values = {}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{who}: unknown key {key!r}{did_you_mean(key, known)}")
        text = ":".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            values[key] = _READERS.get(key, str)(text)
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"{who}: {key}: cannot read {text!r}, expected {_EXPECTED[key]}") from None
    return Preprocess(**values)


def _size(text: str) -> int | Size:
    sizes = [int(size) for size in text.replace(":", "x").split("x")]
    if len(sizes) == 1:
        return sizes[0]
    height, width = sizes
    return height, width


def _box(text: str) -> Size:
    size = _size(text)
    return (size, size) if isinstance(size, int) else size


def _number(text: str) -> float:
    return float(Fraction(text))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(_number, text.split(":")))


_READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("resize", "crop"), _size),
    "letterbox": _box,
    **dict.fromkeys(("pad", "scale"), _number),
    **dict.fromkeys(("mean", "std", "background"), _numbers),
}
_EXPECTED = {
    **dict.fromkeys(("resize", "crop", "letterbox"), "a side (224) or height x width (480x640)"),
    **dict.fromkeys(("pad", "scale"), "a number (0.5 or 1/255)"),
    **dict.fromkeys(("mean", "std", "background"), "a number, or one for each channel (0.485:0.456:0.406)"),
}
