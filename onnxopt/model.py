"""Load, size, fingerprint and save models; `onnx_ir.Model` as it is, no wrapper.

Weights stay lazy: external data is memory-mapped when it is read and streamed when it is written,
so that a model above 2 GB never is one protobuf in memory.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxopt.admission import admit
from onnxopt.errors import ModelError, one_line
from onnxopt.graph import graphs, roots, subgraphs_of, tensors, walk
from onnxopt.packing import is_packed
from onnxopt.packing.unpacker import unpacked
from onnxopt.protobuf import in_memory, skeleton
from onnxopt.streamed import pieces, sample

__all__ = [
    "ModelLike",
    "clone",
    "data_file",
    "fingerprint",
    "load",
    "opener",
    "reusable",
]

ModelLike = str | os.PathLike[str] | bytes | BinaryIO | onnx.ModelProto | ir.Model

_CHUNK = 1 << 24


def opener(source: ModelLike) -> Callable[[], ir.Model]:
    """A function that gives a fresh, independent `ir.Model` of `source` at each call.

    A file object is read once, here, and so is a pack; weights are shared between the models it gives.
    """
    if isinstance(source, ir.Model):
        return lambda: clone(source)
    if isinstance(source, onnx.ModelProto):
        return lambda: _from_proto(_copy(source), "model", None)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return lambda: _from_proto(_parse(data, "model"), "model", None)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return opener(_load_pack(path)) if is_packed(path) else lambda: _load_file(path)
    if hasattr(source, "read"):
        return opener(reusable(source))
    raise ModelError(
        f"model: expected a path, bytes, a file, a ModelProto or an ir.Model, not {type(source)}"
    )


def load(source: ModelLike) -> ir.Model:
    """Load a model from a path, bytes, a binary file object, a `ModelProto` or an `ir.Model`.

    An `ir.Model` is cloned (weights shared), so the caller's model is never changed. A path may be that of
    a pack, see `onnxopt.pack`; its weights are then read into memory.

    Raises:
        ModelError: not a file, not ONNX, a damaged pack, no opset import, an IR version or opset newer than
            the installed onnx knows, or external data that is missing, too short or outside the folder.
    """
    return opener(source)()


def reusable(source: ModelLike) -> ModelLike:
    """The source, to be read as often as needed: of a file object, which can be read once, its bytes."""
    if not hasattr(source, "read"):
        return source
    content = source.read()
    if not isinstance(content, bytes):
        raise ModelError("model: the file is open as text: open it as binary, with mode 'rb'")
    return content


def clone(model: ir.Model) -> ir.Model:
    """A clone whose tensors are its own, as far as names and mapped files go; their data is shared."""
    own = model.clone()
    _replace_tensors(own, _own, _own)
    return own


def _replace_tensors(
    model: ir.Model,
    initializer: Callable[[ir.TensorProtocol], ir.TensorProtocol],
    attribute: Callable[[ir.TensorProtocol], ir.TensorProtocol],
) -> None:
    """Put in place of each initializer's and each tensor attribute's tensor the one that is given for it."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = initializer(value.const_value)
        for node in graph:
            for name, attr in node.attributes.items():
                if attr.is_ref() or attr.type != ir.AttributeType.TENSOR:
                    continue
                new = attribute(attr.value)
                if new is not attr.value:
                    node.attributes[name] = ir.AttrTensor(name, new, attr.doc_string)


def _own(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor of the same data; a name given to it stays its own."""
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        return ir.Tensor(
            tensor.numpy(),
            dtype=tensor.dtype,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
    return copy.copy(tensor)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Tensors of the ir share names with the protobuf they came from: a copy keeps the caller's as it is."""
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    return own


def _load_file(path: Path) -> ir.Model:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, not an ONNX file")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is no regular file, and a model is read more than once: write it to one")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    return _from_proto(_parse(data, str(path)), str(path), path)


def _load_pack(path: Path) -> ir.Model:
    def read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)

    with unpacked(path) as file:
        model = _from_proto(_parse(file.read_bytes(), str(path)), str(path), file)
        _replace_tensors(model, read, read)
    return model


def _parse(data: bytes, who: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{who}: the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{who}: not an ONNX model, or cut off: the protobuf cannot be parsed") from None
    return proto


def _from_proto(proto: onnx.ModelProto, who: str, path: Path | None) -> ir.Model:
    admit(proto, who)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, NotImplementedError):
            raise ModelError(f"{who}: {one_line(cause).partition('.')[0]}") from error
        raise ModelError(f"{who}: not a valid ONNX graph: {one_line(cause)}") from error
    _normalise_domains(model)
    _bind_tensors(model, who, path)
    if not all(map(_is_sorted, graphs(model))):
        _sort(model, who)
    return model


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain: onnx_ir wraps it in one more for each level of the graph."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _normalise_domains(model: ir.Model) -> None:
    """`ai.onnx` is the long name of the default domain; nodes bear the short one already."""
    for root in roots(model):
        if "ai.onnx" in root.opset_imports:
            root.opset_imports[""] = root.opset_imports.pop("ai.onnx")


def _bind_tensors(model: ir.Model, who: str, path: Path | None) -> None:
    """Refuse tensors whose data is not there or does not fit, and tell the external ones their file.

    External tensors in attributes are read: in what is saved, only initializers are external.
    """

    def bound(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return _bound(tensor, who, path)

    def read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        checked = bound(tensor)
        return in_memory(checked) or checked

    _replace_tensors(model, bound, read)


def _bound(tensor: ir.TensorProtocol, who: str, path: Path | None) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.UNDEFINED or min(tensor.shape.numpy(), default=0) < 0:
        raise ModelError(f"{who}: tensor {tensor.name!r} has no element type, or a negative size")
    if isinstance(tensor, ir.ExternalTensor):
        return _bound_to_file(tensor, f"{who}: external data of tensor {tensor.name!r}", path)
    try:
        tensor.numpy()
    except ValueError:
        raise ModelError(f"{who}: the data of tensor {tensor.name!r} does not fit its shape") from None
    return tensor


def _bound_to_file(tensor: ir.ExternalTensor, where: str, path: Path | None) -> ir.ExternalTensor:
    """The tensor with its file's own path; the file must be long enough.

    onnx_ir holds a path against a folder by itself only where it is told one, and then refuses hard links,
    which package managers make: it is told none.
    """
    if path is None:
        raise ModelError(f"{where} needs a folder: load the model from its path")
    location = os.fspath(tensor.location)
    file = data_file(path, location, where)
    if tensor.length not in (None, tensor.nbytes):
        raise ModelError(f"{where} has {tensor.length} bytes on record, its type and shape {tensor.nbytes}")
    size, end = file.stat().st_size, (tensor.offset or 0) + tensor.nbytes
    if size < end:
        raise ModelError(f"{where} is cut off: {location!r} has {size} bytes, {end} are needed")
    return ir.ExternalTensor(
        file,
        tensor.offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
    )


def data_file(model: Path, location: str, where: str) -> Path:
    """The file of external data that a model calls `location`; it must lie in the model's folder.

    Download caches keep a model and its data as links to two files in one other folder: that is allowed.

    Raises:
        ModelError: it lies elsewhere, or is not there; the message starts with `where`.
    """
    file = (model.parent / location).resolve()
    inside = file.is_relative_to(model.parent.resolve()) or file.parent == model.resolve().parent
    if os.path.isabs(location) or os.path.normpath(location).startswith("..") or not inside:
        raise ModelError(f"{where} lies outside the model's folder: {location!r}")
    if not file.is_file():
        raise ModelError(f"{where} is missing: no file {location!r} beside the model")
    return file


def _is_sorted(graph: ir.Graph) -> bool:
    """Whether each node stands after those it reads from; bodies count as part of their node."""
    seen: set[ir.Node] = set()
    for node in graph:
        within = (value for body in subgraphs_of(node) for inner in walk(body) for value in inner.inputs)
        for value in itertools.chain(node.inputs, within):
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph and producer not in seen:
                return False
        seen.add(node)
    return True


def _sort(model: ir.Model, who: str) -> None:
    try:
        for root in roots(model):
            root.sort()
    except ValueError:
        raise ModelError(f"{who}: the graph has a cycle") from None


def fingerprint(source: ModelLike, loaded: ir.Model | None = None) -> str:
    """SHA-256 of the model: of the file's bytes, then of pages spread over each tensor of external data.

    `loaded` is the source as the caller has loaded it, so that it need not be again.
    """
    digest = hashlib.sha256()
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        for tensor in tensors(loaded or load(source)):
            if isinstance(tensor, ir.ExternalTensor):
                digest.update(sample(tensor))
    elif isinstance(source, bytes):
        digest.update(source)
    elif isinstance(source, onnx.ModelProto):
        digest.update(source.SerializeToString(deterministic=True))
    else:
        model = loaded or load(source)
        digest.update(skeleton(model, keep=0).SerializeToString(deterministic=True))
        for tensor in tensors(model):
            for piece in (sample(tensor),) if isinstance(tensor, ir.ExternalTensor) else pieces(tensor):
                digest.update(piece)
    return digest.hexdigest()
