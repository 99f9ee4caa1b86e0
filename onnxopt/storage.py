"""Write models: streamed, atomic, the same bytes each time.

A model is first staged, whole, in a temporary folder beside its target, and then moved into place.
External data goes into a file with a hash in its name, so that a process killed at any moment leaves the
old model or the new one: new data takes the place of old data only where the graphs are the same to the
byte, and then that one move is the whole change. The hash is of the graph, of what is written from memory,
and of pages spread over what is copied from file to file, which is not worth reading for a name.

What replaces a model is on the disk before that model goes; a first version is left to the system to write.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxopt.errors import ModelError
from onnxopt.graph import graphs, tensor_bytes, tensors, uses_external_data
from onnxopt.model import ModelLike, clone, load
from onnxopt.packing import is_packed
from onnxopt.packing.unpacker import unpacked
from onnxopt.protobuf import LARGEST_PROTOBUF, dump, in_memory, serialize, swapped
from onnxopt.streamed import pieces, sample, sources

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
    """What a runtime can open: a path as it is, small models as bytes, else a file in a temporary folder."""
    if isinstance(source, str | os.PathLike) and is_packed(source):
        with unpacked(Path(source)) as file:
            yield file
    elif isinstance(source, str | os.PathLike):
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
    digest, draft = hashlib.sha256(), folder / "data"
    offsets = _write_data(model, draft, digest) if external_data else {}

    def place(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if id(tensor) not in offsets:
            return in_memory(tensor)
        return ir.ExternalTensor(
            draft.name,
            offsets[id(tensor)],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name="",
        )

    with swapped(model, place):
        proto = ir.to_proto(model)
    data_file = None
    if offsets:
        digest.update(serialize(proto))
        data_file = draft.rename(folder / f"{name}.{digest.hexdigest()[:16]}.data")
        for entry in _locations(proto):
            entry.value = data_file.name
    model_file = folder / name
    model_file.write_bytes(serialize(proto))
    return Staged(model_file, data_file, source_files(model))


def source_files(model: ir.Model) -> frozenset[Path] | None:
    """The files that the weights of a model are read from; None: they cannot be told."""
    files = [sources(tensor) for tensor in tensors(model)]
    return None if None in files else frozenset().union(*filter(None, files))


def commit(staged: Staged, target: Path) -> Path:
    """Move a staged model into place, data first; then remove the data of the model it replaces."""
    target = target.resolve()
    if target in (staged.sources or ()):
        raise ModelError(f"{target}: cannot be written: the model's own external data is in this file")
    with _locked(target.parent):
        replaces = target.exists()
        outdated = _own_data(target) - staged.sources if staged.sources is not None else set()
        if replaces:
            shutil.copymode(target, staged.model_file)
            _sync(staged)
        if staged.data_file is not None:
            place = target.parent / staged.data_file.name
            outdated.discard(place)
            _move_data(staged, place)
        if replaces:
            _sync_folder(target.parent)
        os.replace(staged.model_file, target)
        if replaces:
            _sync_folder(target.parent)
        for file in outdated:
            file.unlink(missing_ok=True)
    return target


def _move_data(staged: Staged, place: Path) -> None:
    """Move the data file; where the model in memory may read what stands there, that has to be equal."""
    assert staged.data_file is not None
    if not place.exists() or (staged.sources is not None and place not in staged.sources):
        os.replace(staged.data_file, place)
    elif not filecmp.cmp(staged.data_file, place, shallow=False):
        raise ModelError(f"{place}: cannot be replaced: the model in memory reads its weights from this file")


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
    return {target.parent / name for entry in _locations(proto) if pattern.fullmatch(name := entry.value)}


def _locations(proto: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Where the files of external weights are named."""
    weights = (tensor for graph in _graphs_of(proto.graph) for tensor in graph.initializer)
    return (entry for tensor in weights for entry in tensor.external_data if entry.key == "location")


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


def _write_data(model: ir.Model, file: Path, digest: hashlib._Hash) -> dict[int, int]:
    """Stream the large weights into one file, and what tells them apart into `digest`; offsets by id."""
    offsets: dict[int, int] = {}
    with file.open("wb") as stream:
        for tensor in _large_weights(model):
            if id(tensor) in offsets:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            offsets[id(tensor)] = stream.tell()
            if isinstance(tensor, ir.ExternalTensor):
                tensor.tofile(stream)
                digest.update(sample(tensor))
                continue
            for piece in pieces(tensor):
                stream.write(piece)
                digest.update(piece)
    return offsets


def _large_weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _ALIGNMENT and tensor.dtype != ir.DataType.STRING:
                yield tensor


def _sync(staged: Staged) -> None:
    for file in filter(None, (staged.data_file, staged.model_file)):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
