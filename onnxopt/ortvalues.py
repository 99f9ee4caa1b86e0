"""Arrays on their way in and out of ONNX Runtime, for the types that numpy lacks."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401 - numpy then knows its types by name
import numpy as np

__all__ = ["TensorInfo", "array_from", "describe", "is_foreign", "value_for"]

# onnxruntime takes and gives the memory of these, but no array; ONNX's numbers of them.
_FOREIGN = {"bfloat16": 16, "float8e4m3fn": 17, "float8e4m3fnuz": 18, "float8e5m2": 19, "float8e5m2fnuz": 20}
_NUMPY_NAMES = {"float": "float32", "string": "object", "float4e2m1": "float4_e2m1fn"}


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a session.

    `type` is ONNX Runtime's spelling, ``tensor(float)`` or ``seq(tensor(int64))``; `dtype` that of the
    elements, object for strings; in `shape` a symbol or None is a dynamic axis (() also for an unknown rank).
    """

    name: str
    type: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def describe(arg: Any) -> TensorInfo:
    """What an `onnxruntime.NodeArg` says."""
    shape = tuple(None if isinstance(size, int) and size < 0 else size for size in arg.shape)
    return TensorInfo(arg.name, arg.type, _dtype(arg.type), shape)


def is_foreign(kind: str) -> bool:
    """Whether a type, as ONNX Runtime spells it, has elements that numpy lacks."""
    return _element(kind) in _FOREIGN


def value_for(array: np.ndarray, kind: str, ort_value: Any) -> Any:
    """An OrtValue of the foreign type `kind` with the content of `array`; `ort_value` is the class."""
    dtype = _dtype(kind)
    words = np.asarray(array, dtype, order="C").view(f"u{dtype.itemsize}")
    return ort_value.ortvalue_from_numpy_with_onnx_type(words, _FOREIGN[_element(kind)])


def array_from(value: Any) -> Any:
    """The content of an OrtValue on the CPU, copied; of a foreign type as an array of ml_dtypes."""
    if not is_foreign(value.data_type()):
        return value.numpy()
    dtype, shape = _dtype(value.data_type()), value.shape()
    memory = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)


def _dtype(kind: str) -> np.dtype[Any]:
    element = _element(kind)
    return np.dtype(_NUMPY_NAMES.get(element, element.replace("float8", "float8_")))


def _element(kind: str) -> str:
    """``seq(tensor(float))`` -> ``float``."""
    return kind.rpartition("(")[2].rstrip(")")
