"""The model as one protobuf: whole, with its weights somewhere else, or without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from onnxopt.errors import ModelError, one_line
from onnxopt.graph import graphs, tensor_bytes

__all__ = ["LARGEST_PROTOBUF", "dump", "in_memory", "serialize", "skeleton", "swapped"]

LARGEST_PROTOBUF = 2**31 - 2**24
"""Bytes of tensors that still go into one protobuf: its limit of 2 GiB less 16 MiB for the graph."""


def dump(model: ir.Model) -> onnx.ModelProto:
    """The model as one protobuf, weights included.

    Raises:
        ModelError: more than 2 GB of weights, which need a path to be saved to.
    """
    size = tensor_bytes(model)
    if size > LARGEST_PROTOBUF:
        raise ModelError(f"model: {size} bytes of weights do not fit one protobuf (2 GB): save it to a path")
    with swapped(model, in_memory):
        return ir.to_proto(model)


def serialize(proto: onnx.ModelProto) -> bytes:
    """The model as bytes, the same bytes for the same model.

    Raises:
        ModelError: the graph itself, without external weights, does not fit one protobuf.
    """
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise ModelError(f"model: cannot be written as one protobuf: {one_line(error)}") from error


def skeleton(model: ir.Model, keep: int = 1024) -> onnx.ModelProto:
    """The model without its weights, for onnx's checker and shape inference, which copy what they get.

    Initializers of the main graph above `keep` bytes become graph inputs of the same type.
    """

    def hollow(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if tensor.nbytes <= keep:
            return None
        return ir.ExternalTensor(
            "weights",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
        )

    with swapped(model, hollow, only=[model.graph]):
        proto = ir.to_proto(model)
    known = {value.name for value in proto.graph.input}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        elif tensor.name not in known:
            value = proto.graph.input.add(name=tensor.name)
            value.type.tensor_type.elem_type = tensor.data_type
            for size in tensor.dims:
                value.type.tensor_type.shape.dim.add(dim_value=size)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """External tensors read into memory; None for the others, which are in memory already."""
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype) if isinstance(tensor, ir.ExternalTensor) else None


@contextlib.contextmanager
def swapped(
    model: ir.Model,
    swap: Callable[[ir.TensorProtocol], ir.TensorProtocol | None],
    only: Iterable[ir.Graph] | None = None,
) -> Iterator[None]:
    """Within the block, initializers hold the tensor that `swap` gives for theirs (None: as it is)."""
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for graph in graphs(model) if only is None else only:
            for value in graph.initializers.values():
                tensor = value.const_value
                other = swap(tensor) if tensor is not None else None
                if tensor is not None and other is not None:
                    other.name = value.name
                    kept.append((value, tensor))
                    value.const_value = other
        yield
    finally:
        for value, tensor in kept:
            value.const_value = tensor
