"""What flows through the graph: tensors on the device, and small numbers that stay on the host.

Shapes, axes and the like are `Host` values, so that no operator waits for the device to learn a size, and
so that `torch.compile` sees plain integers. Types that torch has no arithmetic for are carried in wider ones,
see `CARRIERS`; they take their own type at the border of the graph only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = [
    "CARRIERS",
    "HOST_LIMIT",
    "NATIVE",
    "Host",
    "array_tensor",
    "deliver",
    "host_of",
    "numbers_of",
    "on_host",
    "receive",
    "tensor_of",
    "to_device",
    "whole",
]

_T = ir.DataType
NATIVE = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.BOOL: torch.bool,
    _T.COMPLEX64: torch.complex64,
    _T.COMPLEX128: torch.complex128,
    _T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _T.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _T.FLOAT8E5M2: torch.float8_e5m2,
    _T.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    _T.FLOAT8E8M0: torch.float8_e8m0fnu,
}
"""The torch type of graph inputs and outputs; those that are missing here go by their carrier."""

_CARRIED = {
    **dict.fromkeys((_T.INT4, _T.INT2), torch.int8),
    **dict.fromkeys((_T.UINT4, _T.UINT2), torch.uint8),
    _T.UINT16: torch.int32,
    **dict.fromkeys((_T.UINT32, _T.UINT64), torch.int64),
    **dict.fromkeys((_T.FLOAT8E4M3FN, _T.FLOAT8E4M3FNUZ, _T.FLOAT8E5M2, _T.FLOAT8E5M2FNUZ), torch.float32),
    **dict.fromkeys((_T.FLOAT8E8M0, _T.FLOAT4E2M1), torch.float32),
}
CARRIERS = {**NATIVE, **_CARRIED}
"""The torch type that holds a type's values inside the graph."""

HOST_LIMIT = 1024
"""Elements of the largest value that is kept on the host."""


_ARRAYS = (np.ndarray, np.generic)  # a union of types is nothing that torch.compile knows


class Host(NamedTuple):
    """A small value on the host: torch type, shape and elements in row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: tuple[Any, ...]


def tensor_of(array: np.ndarray, dtype: ir.DataType) -> Tensor:
    """The carrier of a numpy array (of ml_dtypes where numpy has no such type); the memory is its own."""
    carrier = CARRIERS[dtype]
    if dtype in _CARRIED:
        wide = array.astype(np.float32 if carrier.is_floating_point else np.int64)
        return torch.from_numpy(np.array(wide)).to(carrier)
    if dtype == _T.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(carrier)
    return torch.from_numpy(np.array(array))


def array_tensor(array: np.ndarray) -> Tensor:
    """An array of data as a tensor, if possible without a copy; for types of ml_dtypes see `tensor_of`."""
    if array.dtype.kind == "V":  # of ml_dtypes
        return tensor_of(array, ir.DataType.from_numpy(array.dtype))
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())


def receive(value: Any, dtype: ir.DataType | None) -> Any:
    """A graph input as the graph carries it."""
    if isinstance(value, list):
        return [receive(one, dtype) for one in value]
    if isinstance(value, _ARRAYS) and dtype in CARRIERS:
        return tensor_of(np.asarray(value), dtype)
    if not isinstance(value, Tensor):
        return value
    return value.to(_CARRIED[dtype]) if dtype in _CARRIED else value


def deliver(value: Any, dtype: ir.DataType | None, anchor: Tensor) -> Any:
    """A graph output as a tensor of its own type."""
    if isinstance(value, list):
        return [deliver(one, dtype, anchor) for one in value]
    if isinstance(value, Host):
        value = to_device(value, anchor.device)
    if dtype in _CARRIED and dtype in NATIVE and isinstance(value, Tensor):
        return value.to(NATIVE[dtype])
    if dtype in CARRIERS and isinstance(value, Tensor) and not CARRIERS[dtype].is_floating_point:
        return value.to(CARRIERS[dtype])  # integers that are carried as floats
    return value


def to_device(value: Host, device: torch.device | None = None) -> Tensor:
    """A host value as a tensor."""
    return torch.tensor(value.data, dtype=value.dtype, device=device).reshape(value.shape)


def host_of(tensor: Tensor) -> Host:
    """A small tensor as a host value."""
    return Host(tensor.dtype, tuple(tensor.shape), tuple(tensor.reshape(-1).tolist()))


def numbers_of(value: Any) -> tuple[Any, ...] | None:
    """The elements of a static input; those of a tensor that is computed on a device are waited for."""
    if value is None:
        return None
    return value.data if isinstance(value, Host) else tuple(value.reshape(-1).tolist())


def on_host(run: Callable[..., Any], static: tuple[int, ...]) -> Callable[..., Any]:
    """An operator that runs on host values, on the CPU; its results are on the host unless they are large.

    `torch.compile` makes constants of what it gives for constants; it knows plain tuples as such.
    """

    def compute(*values: tuple[Any, ...] | None) -> tuple[Any, ...]:
        hosts = [None if one is None else Host(*one) for one in values]
        args = [
            numbers_of(one) if i in static else to_device(one) if one is not None else None
            for i, one in enumerate(hosts)
        ]
        with torch.no_grad():
            found = run(*args)
        results = found if isinstance(found, tuple) else (found,)
        return tuple(
            tuple(host_of(one)) if isinstance(one, Tensor) and one.numel() <= HOST_LIMIT else one
            for one in results
        )

    constant: Callable[..., Any] = torch._dynamo.assume_constant_result(compute)

    def called(*values: Host | None) -> tuple[Any, ...]:
        found = constant(*[None if one is None else tuple(one) for one in values])
        return tuple([Host(*one) if isinstance(one, tuple) else one for one in found])

    return called


def whole(value: Any) -> Any:
    """Nested values with the tensors that processes have a part each of put together, on the CPU, in all."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [whole(one) for one in value]
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
