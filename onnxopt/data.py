"""Samples to prove, calibrate and evaluate on: the user's own, or synthetic ones.

A sample is a complete feed, one array per graph input. It comes from a folder of ``.npz`` (a file a sample),
one ``.npz`` (samples along the first axis), a folder of ``.npy`` (models with one input), Python, or
`synthesize`, which makes valid ones from the graph alone.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.model import ModelLike, load
from onnxopt.synthesis import synthesize
from onnxopt.synthesis.inputs import Input, overridable_inputs, required_inputs

__all__ = ["FeedSource", "Feeds", "Samples", "parse_shape", "python_target", "read_feeds", "synthesize"]

Feeds = dict[str, np.ndarray]
"""One complete sample: graph input name -> array."""

FeedSource = (
    str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Any]]
)

_SHAPE = re.compile(r"\d+(x\d+)*")
_TARGET = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<what>[A-Za-z_]\w*)")
_SAFE_CASTS = {("float64", "float32"), ("int32", "int64"), ("int64", "int32")}


class Samples(Sequence[Feeds]):
    """Feeds that are read and checked when they are asked for."""

    def __init__(self, length: int, read: Callable[[int], Feeds]) -> None:
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Feeds | Samples:
        chosen = range(self._length)[index]
        if isinstance(chosen, range):
            return Samples(len(chosen), lambda number: self._read(chosen[number]))
        return self._read(chosen)


def read_feeds(source: FeedSource, model: ModelLike) -> Samples:
    """The user's samples for a model, checked against its inputs; the first one at once, others when read.

    Args:
        source: a folder of ``.npz``, one file a sample in the order of their names; one ``.npz``, where an
            array of its input's own rank is split along axis 0 into batches of one, and one of a rank more
            has a sample axis in front (a scalar serves all samples); a folder of ``.npy`` for a model with
            one input, a file a sample, with or without the batch axis; ``file.py:function`` or
            ``module:function``; a callable; an iterable of mappings; or one mapping.
        model: a path, bytes, a file object, a ModelProto or an ir.Model.

    Returns:
        A sequence of feeds. Arrays that are no input of the model are left out; float64 becomes float32, and
        int32 and int64 become each other, where the model asks for it and the values fit.

    Raises:
        UsageError: nothing there, not readable, an input without an array, or a wrong dtype or shape.
    """
    contract = _contract(load(model))
    samples = _open(source, contract)
    if not len(samples):
        raise UsageError(f"--data: {_label(source)} holds no samples")
    samples[0]
    return samples


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``name=1x3x224x224`` -> ``("name", (1, 3, 224, 224))``; names may hold ``=``, ``:`` and ``;``.

    An empty shape (``name=``) stands for a scalar. Raises UsageError.
    """
    name, separator, sizes = text.rpartition("=")
    if not separator or not name or (sizes and not _SHAPE.fullmatch(sizes)):
        raise UsageError(f"--shape {text!r}: expected name=AxBxC, for example image=1x3x224x224")
    return name, tuple(int(size) for size in sizes.split("x")) if sizes else ()


def python_target(text: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` or ``module:function`` names; the file or module is run.

    Raises:
        UsageError: no such file, module or function, or it fails when it is loaded.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r}: expected file.py:function or module:function")
    where, what = match["where"], match["what"]
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"{text}: no such file {where!r}")
    try:
        if where.endswith(".py"):
            function = runpy.run_path(where, run_name=Path(where).stem).get(what)
        else:
            function = getattr(importlib.import_module(where), what, None)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UsageError(f"{text}: loading {where!r} failed: {_told(error)}") from error
    if not callable(function):
        raise UsageError(f"{text}: {where!r} has no function {what!r}")
    found: Callable[..., Any] = function
    return found


@dataclass(frozen=True)
class _Contract:
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

    @property
    def only(self) -> Input:
        """The model's one input; raises UsageError where it has several."""
        if len(self.required) != 1:
            names = ", ".join(repr(item.name) for item in self.required)
            raise UsageError(
                f"--data: a folder of .npy serves models with one input, not {names or 'none'}; use .npz"
            )
        return self.required[0]


def _contract(model: ir.Model) -> _Contract:
    return _Contract(required_inputs(model), overridable_inputs(model))


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


def _open(source: FeedSource, contract: _Contract) -> Samples:
    if isinstance(source, Mapping):
        return _from_iterable([source], contract, "data")
    if callable(source):
        return _from_iterable(_called(source, "data"), contract, "data")
    if not isinstance(source, str | os.PathLike):
        return _from_iterable(source, contract, "data")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, contract)
    if path.is_file() and path.suffix == ".npz":
        return _from_npz(path, contract)
    text = os.fspath(source)
    if not path.exists() and _TARGET.fullmatch(text):
        return _from_iterable(_called(python_target(text), text), contract, text)
    found = "is neither a folder nor .npz" if path.exists() else "no such file or folder"
    raise UsageError(f"--data: {text}: {found}; give a folder of .npz or .npy, one .npz, or file.py:function")


def _called(function: Callable[[], Any], who: str) -> list[Any]:
    try:
        return list(function())
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UsageError(f"{who}: it failed to give samples: {_told(error)}") from error


def _from_iterable(source: Iterable[Any], contract: _Contract, who: str) -> Samples:
    items = source if isinstance(source, Sequence) else list(source)

    def read(number: int) -> Feeds:
        item = items[number]
        if not isinstance(item, Mapping):
            raise UsageError(
                f"{who}: sample {number} is a {type(item).__name__}; expected a dict, input name -> array"
            )
        return contract.check(item, f"{who}: sample {number}")

    return Samples(len(items), read)


def _from_folder(folder: Path, contract: _Contract) -> Samples:
    files = sorted(folder.glob("*.npz"))
    if files:
        return Samples(len(files), lambda number: contract.check(_arrays(files[number]), str(files[number])))
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise UsageError(f"--data: {folder}: the folder holds neither .npz nor .npy files")
    item = contract.only

    def read(number: int) -> Feeds:
        array = _array(files[number])
        lacks_batch = item.dims is not None and array.ndim == len(item.dims) - 1
        return contract.check({item.name: array[None] if lacks_batch else array}, str(files[number]))

    return Samples(len(files), read)


def _from_npz(path: Path, contract: _Contract) -> Samples:
    inputs = {item.name: item for item in (*contract.required, *contract.optional)}
    arrays = {name: array for name, array in _arrays(path).items() if name in inputs}
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise UsageError(f"--data: {path}: the inputs differ in their number of samples: {shown}")

    def part(name: str, number: int) -> np.ndarray:
        array, dims = arrays[name], inputs[name].dims
        if array.ndim == 0:
            return array
        return array[number] if dims is not None and array.ndim > len(dims) else array[number : number + 1]

    def read(number: int) -> Feeds:
        return contract.check({name: part(name, number) for name in arrays}, f"{path}: sample {number}")

    return Samples(max(counts.values(), default=1), read)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a .npy")
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"--data: {path}: not a readable .npz: {_told(error)}") from error


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--data: {path}: not a readable .npy: {_told(error)}") from error
    return array


def _label(source: FeedSource) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the source"


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
