"""Arrays on their way in and out of ONNX Runtime, for the types that numpy lacks."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["TensorInfo", "array_from", "describe", "is_foreign", "value_for"]

# onnxruntime takes and gives the memory of these, but no array.
_FOREIGN = frozenset({"bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"})


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
    dtype = ir.DataType[_element(arg.type).upper()].numpy()
    shape = tuple(None if isinstance(size, int) and size < 0 else size for size in arg.shape)
    return TensorInfo(arg.name, arg.type, dtype, shape)


def is_foreign(kind: str) -> bool:
    """Whether a type, as ONNX Runtime spells it, has elements that numpy lacks."""
    return _element(kind) in _FOREIGN


def value_for(array: np.ndarray, kind: str, ort_value: Any) -> Any:
    """An OrtValue of the foreign type `kind` with the content of `array`; `ort_value` is the class."""
    dtype = ir.DataType[_element(kind).upper()]
    words = np.asarray(array, dtype.numpy(), order="C").view(f"u{dtype.numpy().itemsize}")
    return ort_value.ortvalue_from_numpy_with_onnx_type(words, int(dtype))


def array_from(value: Any) -> Any:
    """The content of an OrtValue on the CPU, copied; of a foreign type as an array of ml_dtypes."""
    if not is_foreign(value.data_type()):
        return value.numpy()
    dtype, shape = ir.DataType[_element(value.data_type()).upper()].numpy(), value.shape()
    memory = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)


def _element(kind: str) -> str:
    """``seq(tensor(float))`` -> ``float``."""
    return kind.rpartition("(")[2].rstrip(")")
