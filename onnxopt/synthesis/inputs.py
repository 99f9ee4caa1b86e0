"""The graph inputs a caller has to feed: names, dtypes, declared shapes and their dynamic axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxopt.errors import NoSamplesError

__all__ = ["Dim", "Input", "axis_name", "overridable_inputs", "required_inputs", "resolve"]

Dim = int | str | ir.SymbolicDim
"""A fixed size, the name of a dynamic axis, or an expression over such names (``past + seq``)."""

_UNNAMED = frozenset({"", "?", "-1", "None", "none", "unk", "unknown"})
_EXPRESSION = re.compile(r"[A-Za-z_]\w*( [+*-] \w+)+")


@dataclass(frozen=True)
class Input:
    """One tensor input of a graph."""

    name: str
    dtype: np.dtype[Any]
    """As numpy holds it: object for strings, ml_dtypes for bfloat16, float8 and 4-bit types."""
    dims: tuple[Dim, ...] | None
    """None: the model declares no rank."""

    @property
    def declared(self) -> str:
        """The shape for messages: ``batch x 3 x ? x ?``, ``scalar`` or ``any shape``."""
        if self.dims is None:
            return "any shape"
        shown = [
            "?" if isinstance(dim, str) and dim.startswith(f"{self.name}[") else str(dim) for dim in self.dims
        ]
        return " x ".join(shown) or "scalar"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether rank and fixed sizes agree; dynamic axes take any size."""
        if self.dims is None:
            return True
        return len(shape) == len(self.dims) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(self.dims, shape, strict=True)
        )

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape once each dynamic axis has a size.

        Raises:
            NoSamplesError: the model declares no rank.
        """
        if self.dims is None:
            raise NoSamplesError(
                f"input {self.name!r} declares no shape, so no feed can be made for it; "
                f"give --shape {self.name}=1x3x224x224 or --data"
            )
        return tuple(resolve(dim, sizes) for dim in self.dims)


def required_inputs(model: ir.Model) -> tuple[Input, ...]:
    """The inputs without a default, in the graph's order.

    Raises:
        NoSamplesError: an input is a sequence or has no element type, so that no array can feed it.
    """
    return tuple(_input(value) for value in model.graph.inputs if not value.is_initializer())


def overridable_inputs(model: ir.Model) -> tuple[Input, ...]:
    """The inputs that have an initializer as their default."""
    return tuple(_input(value) for value in model.graph.inputs if value.is_initializer())


def axis_name(value: ir.Value, axis: int) -> Dim | None:
    """The size of an axis, or the name it goes by: its symbol, or ``input[axis]`` where it has none.

    Exporters write ``?`` or -1 for every unknown axis, so that these are no shared symbol. None stands for an
    unnamed axis of a value that is no graph input.
    """
    if value.shape is None:
        return None
    dim = value.shape[axis]
    if isinstance(dim, int) and dim >= 0:
        return dim
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    if symbol is None or symbol in _UNNAMED:
        return f"{value.name}[{axis % len(value.shape)}]" if value.is_graph_input() else None
    return ir.SymbolicDim(symbol) if _EXPRESSION.fullmatch(symbol) else symbol


def _input(value: ir.Value) -> Input:
    name = value.name or ""
    if isinstance(value.type, ir.SequenceType) or value.dtype is None:
        raise NoSamplesError(
            f"input {name!r} is {value.type or 'of no declared type'}: only tensors can be fed"
        )
    dtype = np.dtype(object) if value.dtype == ir.DataType.STRING else value.dtype.numpy()
    if value.shape is None:
        return Input(name, dtype, None)
    axes = (axis_name(value, axis) for axis in range(len(value.shape)))
    return Input(name, dtype, tuple(dim for dim in axes if dim is not None))


def resolve(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The size of an axis; 1 for a name that `sizes` lacks."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, str):
        return sizes.get(dim, 1)
    size = dim.evaluate(sizes)
    return max(size, 1) if isinstance(size, int) else 1
