"""Load, size, fingerprint and save models; `onnx_ir.Model` as it is, no wrapper.

Weights stay lazy: external data is memory-mapped when it is read and streamed when it is written,
so that a model above 2 GB never is one protobuf in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxopt.errors import ModelError, one_line
from onnxopt.graph import pieces, roots, tensor_bytes, tensors
from onnxopt.protobuf import LARGEST_PROTOBUF, dump, skeleton

__all__ = [
    "ModelLike",
    "fingerprint",
    "load",
    "materialize",
    "opener",
    "uses_external_data",
]

ModelLike = str | os.PathLike[str] | bytes | BinaryIO | onnx.ModelProto | ir.Model

_CHUNK = 1 << 24


def opener(source: ModelLike) -> Callable[[], ir.Model]:
    """A function that gives a fresh, independent `ir.Model` of `source` at each call.

    A file object is read once, here; weights are shared between the models it gives.
    """
    if isinstance(source, ir.Model):
        return source.clone
    if isinstance(source, onnx.ModelProto):
        return lambda: _from_proto(_copy(source), "model", None)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return lambda: _from_proto(_parse(data, "model"), "model", None)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return lambda: _load_file(path)
    if hasattr(source, "read"):
        return opener(source.read())
    raise ModelError(
        f"model: expected a path, bytes, a file, a ModelProto or an ir.Model, not {type(source)}"
    )


def load(source: ModelLike) -> ir.Model:
    """Load a model from a path, bytes, a binary file object, a `ModelProto` or an `ir.Model`.

    An `ir.Model` is cloned (weights shared), so the caller's model is never changed.

    Raises:
        ModelError: not a file, not ONNX, no opset import, an IR version or opset newer than the
            installed onnx knows, or external data that is missing, too short or outside the folder.
    """
    return opener(source)()


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Tensors of the ir share names with the protobuf they came from: a copy keeps the caller's as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _load_file(path: Path) -> ir.Model:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, not an ONNX file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    return _from_proto(_parse(data, str(path)), str(path), path.parent)


def _parse(data: bytes, who: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{who}: the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{who}: not an ONNX model, or cut off: the protobuf cannot be parsed") from None
    return proto


def _from_proto(proto: onnx.ModelProto, who: str, folder: Path | None) -> ir.Model:
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(f"{who}: not an ONNX model: it has no IR version or no graph")
    if not proto.opset_import:
        raise ModelError(
            f"{who}: no opset import (IR version {proto.ir_version}), so its operators have no meaning; "
            "export it again, or raise it to IR version 4 with an opset"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{who}: IR version {proto.ir_version} is newer than onnx {onnx.__version__} knows "
            f"({onnx.IR_VERSION}); upgrade onnx"
        )
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"{who}: opset {entry.version} is newer than onnx {onnx.__version__} knows ({newest}); "
                "upgrade onnx"
            )
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{who}: not a valid ONNX graph: {one_line(error)}") from error
    _normalise_domains(model)
    _bind_external_data(model, who, folder)
    if not _is_sorted(model.graph):
        _sort(model, who)
    return model


def _normalise_domains(model: ir.Model) -> None:
    """`ai.onnx` is the long name of the default domain; nodes bear the short one already."""
    for root in roots(model):
        if "ai.onnx" in root.opset_imports:
            root.opset_imports[""] = root.opset_imports.pop("ai.onnx")


def _bind_external_data(model: ir.Model, who: str, folder: Path | None) -> None:
    """Point external tensors at `folder`, and refuse those that are missing, too short or outside it."""
    for tensor in tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        where = f"{who}: external data of tensor {tensor.name!r}"
        if folder is None:
            raise ModelError(f"{where} needs a folder: load the model from its path")
        location = os.fspath(tensor.location)
        path, root = (folder / location).resolve(), folder.resolve()
        if os.path.isabs(location) or not path.is_relative_to(root):
            raise ModelError(f"{where} lies outside the model's folder: {location!r}")
        if not path.is_file():
            raise ModelError(f"{where} is missing: no file {location!r} beside the model")
        end = (tensor.offset or 0) + tensor.nbytes
        if path.stat().st_size < end:
            raise ModelError(
                f"{where} is cut off: {location!r} has {path.stat().st_size} bytes, {end} are needed"
            )
        tensor.base_dir = folder


def _is_sorted(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph and producer not in seen:
                return False
        seen.add(node)
    return True


def _sort(model: ir.Model, who: str) -> None:
    try:
        model.graph.sort()
    except ValueError:
        raise ModelError(f"{who}: the graph has a cycle") from None


def uses_external_data(model: ir.Model) -> bool:
    """Whether any tensor lies in a file of its own, or is computed from one when it is read."""
    return any(isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) for tensor in tensors(model))


@contextlib.contextmanager
def materialize(source: ModelLike) -> Iterator[Path | bytes]:
    """What a runtime can open: a path as it is, small models as bytes, large ones in a temporary folder."""
    from onnxopt.storage import stage

    if isinstance(source, str | os.PathLike):
        yield Path(source)
    elif isinstance(source, bytes):
        yield source
    elif isinstance(source, onnx.ModelProto):
        yield source.SerializeToString()
    elif isinstance(source, ir.Model) and tensor_bytes(source) <= LARGEST_PROTOBUF:
        # dumping swaps external weights for read ones: in a clone, since others may be reading this model
        model = source.clone() if uses_external_data(source) else source
        yield dump(model).SerializeToString(deterministic=True)
    else:
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
            yield stage(load(source), Path(folder), "model.onnx").model_file


def fingerprint(source: ModelLike) -> str:
    """SHA-256 of the model: of the file's bytes, followed by those of its external data files."""
    digest = hashlib.sha256()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        model = load(path)
        files = [path, *sorted({Path(t.path) for t in tensors(model) if isinstance(t, ir.ExternalTensor)})]
        for file in files:
            with file.open("rb") as stream:
                _absorb(digest, stream)
    elif isinstance(source, bytes):
        digest.update(source)
    elif isinstance(source, onnx.ModelProto):
        digest.update(source.SerializeToString(deterministic=True))
    else:
        model = load(source)
        digest.update(skeleton(model, keep=0).SerializeToString(deterministic=True))
        for tensor in tensors(model):
            for piece in pieces(tensor):
                digest.update(piece)
    return digest.hexdigest()


def _absorb(digest: hashlib._Hash, stream: io.BufferedReader) -> None:
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
