"""What the inputs of a model take, and whether a sample gives it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.data.samples import Feeds
from onnxopt.errors import UsageError
from onnxopt.synthesis.inputs import Input, overridable_inputs, required_inputs

__all__ = ["Contract", "contract_of", "parse_shape"]

_SHAPE = re.compile(r"\d+(x\d+)*")
_SAFE_CASTS = {("float64", "float32"), ("int32", "int64"), ("int64", "int32")}


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``name=1x3x224x224`` -> ``("name", (1, 3, 224, 224))``; names may hold ``=``, ``:`` and ``;``.

    An empty shape (``name=``) stands for a scalar. Raises UsageError.
    """
    name, separator, sizes = text.rpartition("=")
    if not separator or not name or (sizes and not _SHAPE.fullmatch(sizes)):
        raise UsageError(f"--shape {text!r}: expected name=AxBxC, for example image=1x3x224x224")
    return name, tuple(int(size) for size in sizes.split("x")) if sizes else ()


@dataclass(frozen=True)
class Contract:
    """What the model's inputs take."""

    required: tuple[Input, ...]
    optional: tuple[Input, ...]

    def check(self, arrays: Mapping[str, Any], who: str) -> Feeds:
        """A complete feed in the model's dtypes, or a UsageError that starts with `who`."""
        missing = [item.name for item in self.required if item.name not in arrays]
        if missing:
            there = ", ".join(map(repr, arrays)) or "nothing"
            raise UsageError(f"{who}: no array for input {', '.join(map(repr, missing))} (it has {there})")
        given = [item for item in (*self.required, *self.optional) if item.name in arrays]
        return {item.name: _fitted(np.asarray(arrays[item.name]), item, who) for item in given}

    def only(self, kind: str) -> Input:
        """The model's one input, for a folder of such files; raises UsageError where it has several."""
        if len(self.required) != 1:
            names = ", ".join(repr(item.name) for item in self.required)
            raise UsageError(
                f"--data: a folder of {kind} serves models with one input, not {names or 'none'}; use .npz"
            )
        return self.required[0]


def contract_of(model: ir.Model) -> Contract:
    """What the inputs of a model take. Raises NoSamplesError where no array can feed one."""
    return Contract(required_inputs(model), overridable_inputs(model))


def _fitted(array: np.ndarray, item: Input, who: str) -> np.ndarray:
    if not item.accepts(array.shape):
        found = " x ".join(map(str, array.shape)) or "scalar"
        raise UsageError(f"{who}: input {item.name!r} is declared as {item.declared}, found {found}")
    if array.dtype == item.dtype:
        return array
    if item.dtype == object and array.dtype.kind in "UO":
        return array.astype(object)
    wrong = f"{who}: input {item.name!r} takes {item.dtype}, found {array.dtype}"
    if (array.dtype.name, item.dtype.name) not in _SAFE_CASTS:
        raise UsageError(f"{wrong}; convert it")
    with np.errstate(over="ignore"):
        cast = array.astype(item.dtype)
    whole = array.dtype.kind == "i"
    if not (np.array_equal(cast, array) if whole else np.array_equal(np.isinf(cast), np.isinf(array))):
        raise UsageError(f"{wrong}, and its values do not fit; convert it")
    return cast
