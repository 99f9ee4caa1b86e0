"""Write models: streamed, atomic, the same bytes each time.

A model is first staged, whole, in a temporary folder beside its target, and then moved into place.
External data goes into a file that carries its own hash in its name, so that new data never
overwrites the data of the model that still stands there: a process killed at any moment leaves the
old model or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxopt.errors import ModelError
from onnxopt.graph import graphs, pieces, tensor_bytes, tensors, uses_external_data
from onnxopt.model import ModelLike, clone, load
from onnxopt.protobuf import LARGEST_PROTOBUF, dump, in_memory, serialize, swapped

__all__ = ["Staged", "check_target", "commit", "materialize", "save", "stage", "staging"]

_ALIGNMENT = 4096
"""Tensors at least this large go into the external file, each at such a boundary, to be mapped there."""


@dataclass(frozen=True)
class Staged:
    """A model written whole in a temporary folder: its file, and that of its external data if it has one."""

    model_file: Path
    data_file: Path | None
    sources: frozenset[Path] | None
    """External data files that the model in memory still reads from; None where it cannot be told."""


def save(model: ir.Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
    """Write the model at `path`, atomically; the model itself is not changed.

    Args:
        model: the model; external weights are streamed, never held in memory whole.
        path: the target file.
        external_data: weights in a file beside the model, `<name>.<hash>.data`. By default they
            are where they are now: external if any was, or if one protobuf could not hold them.

    Raises:
        ModelError: the place cannot be written to, the disk is full, or the graph is too large.
    """
    target = Path(path)
    if external_data is None:
        external_data = uses_external_data(model) or tensor_bytes(model) > LARGEST_PROTOBUF
    if external_data or uses_external_data(model):
        model = clone(model)  # weights are swapped while it is written, which others who read it must not see
    with staging(target) as folder:
        commit(stage(model, folder, target.resolve().name, external_data=external_data), target)
    return target


@contextmanager
def materialize(source: ModelLike) -> Iterator[Path | bytes]:
    """What a runtime can open: a path as it is, small models as bytes, large ones in a temporary folder."""
    if isinstance(source, str | os.PathLike):
        yield Path(source)
    elif isinstance(source, bytes):
        yield source
    elif isinstance(source, onnx.ModelProto):
        yield source.SerializeToString()
    elif isinstance(source, ir.Model) and tensor_bytes(source) <= LARGEST_PROTOBUF:
        # dumping swaps external weights for read ones: in a clone, since others may be reading this model
        model = clone(source) if uses_external_data(source) else source
        yield dump(model).SerializeToString(deterministic=True)
    else:
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
            yield stage(load(source), Path(folder), "model.onnx", external_data=True).model_file


def check_target(target: Path) -> None:
    """Refuse a place that cannot be written to, before any work is done for it.

    Raises:
        ModelError: it is a folder, a device or write-protected, or its folder is missing or closed to us.
    """
    try:
        complaint = _complaint(target.resolve())
    except OSError as error:
        complaint = error.strerror
    except RuntimeError:
        complaint = "it is a link to itself"
    if complaint:
        raise ModelError(f"{target}: cannot be written: {complaint}")


def _complaint(target: Path) -> str | None:
    if target.is_dir():
        return "it is a folder"
    if target.exists() and not target.is_file():
        return "it is no regular file"
    if target.exists() and not os.access(target, os.W_OK):
        return "it is write-protected"
    if not target.parent.is_dir():
        return f"there is no folder {str(target.parent)!r}"
    return None if os.access(target.parent, os.W_OK) else "its folder is write-protected"


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed at the end; write errors become one clear line."""
    check_target(target)
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.resolve().parent))
        yield folder
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def stage(model: ir.Model, folder: Path, name: str, *, external_data: bool) -> Staged:
    """Write the model as `folder/name`, ready to be opened there or moved by `commit`.

    Its weights are swapped for references meanwhile: the model must be the caller's own.
    """
    data_file, offsets = _write_data(model, folder, name) if external_data else (None, {})

    def place(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if data_file is None or id(tensor) not in offsets:
            return in_memory(tensor)
        return ir.ExternalTensor(
            data_file.name,
            offsets[id(tensor)],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name="",
            base_dir=folder,
        )

    with swapped(model, place):
        content = serialize(model)
    model_file = folder / name
    with model_file.open("wb") as stream:
        stream.write(content)
        _sync(stream)
    return Staged(model_file, data_file, _sources(model))


def _sources(model: ir.Model) -> frozenset[Path] | None:
    found = list(tensors(model))
    if any(isinstance(tensor, ir.LazyTensor) for tensor in found):
        return None
    return frozenset(Path(tensor.path).resolve() for tensor in found if isinstance(tensor, ir.ExternalTensor))


def commit(staged: Staged, target: Path) -> Path:
    """Move a staged model into place, data first; then remove the data of the model it replaces."""
    target = target.resolve()
    if target in (staged.sources or ()):
        raise ModelError(f"{target}: cannot be written: the model's own external data is in this file")
    with _locked(target.parent):
        outdated = _own_data(target) - staged.sources if staged.sources is not None else set()
        if staged.data_file is not None:
            place = target.parent / staged.data_file.name
            os.replace(staged.data_file, place)
            _sync_folder(target.parent)
            outdated.discard(place)
        if target.exists():
            shutil.copymode(target, staged.model_file)
        os.replace(staged.model_file, target)
        _sync_folder(target.parent)
        for file in outdated:
            file.unlink(missing_ok=True)
    return target


def _own_data(target: Path) -> set[Path]:
    """The external data files of the model at `target` that bear a name which `stage` gives."""
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    if not target.exists() or not any(pattern.fullmatch(file.name) for file in target.parent.iterdir()):
        return set()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(target.read_bytes())
    except DecodeError:  # what is replaced is no model
        return set()
    weights = (tensor for graph in _graphs_of(proto.graph) for tensor in graph.initializer)
    names = {entry.value for t in weights for entry in t.external_data if entry.key == "location"}
    return {target.parent / name for name in names if pattern.fullmatch(name)}


def _graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("g"):
                yield from _graphs_of(attr.g)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One commit at a time in a folder, where the system has such locks."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_data(model: ir.Model, folder: Path, name: str) -> tuple[Path | None, dict[int, int]]:
    """Stream the large weights into one file, named by its SHA-256; also the offset of each tensor, by id."""
    digest = hashlib.sha256()
    draft = folder / "data"
    offsets: dict[int, int] = {}
    with draft.open("wb") as stream:
        for tensor in _large_weights(model):
            if id(tensor) in offsets:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            offsets[id(tensor)] = stream.tell()
            digest.update(stream.tell().to_bytes(8, "little"))
            for chunk in pieces(tensor):
                stream.write(chunk)
                digest.update(chunk)
        _sync(stream)
    if not offsets:
        draft.unlink()
        return None, {}
    return draft.rename(folder / f"{name}.{digest.hexdigest()[:16]}.data"), offsets


def _large_weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _ALIGNMENT and tensor.dtype != ir.DataType.STRING:
                yield tensor


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
