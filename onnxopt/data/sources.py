"""Where the user's samples come from: files, folders, images, Python."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.data.contract import Contract, contract_of
from onnxopt.data.images import PREPROCESS_FILE, Images, image_files, read_image
from onnxopt.data.preprocess import example_for, read_preprocess
from onnxopt.data.python import called, names_target, python_target, told
from onnxopt.data.samples import Feeds, Samples
from onnxopt.errors import UsageError
from onnxopt.model import ModelLike, load

__all__ = ["FeedSource", "read_feeds"]

FeedSource = (
    str
    | os.PathLike[str]
    | Images
    | Mapping[str, Any]
    | Iterable[Mapping[str, Any]]
    | Callable[[], Iterable[Any]]
)


def read_feeds(source: FeedSource, model: ModelLike) -> Samples:
    """The user's samples for a model, checked against its inputs; the first one at once, others when read.

    Args:
        source: a folder of ``.npz``, one file a sample in the order of their names; one ``.npz``, where an
            array of its input's own rank is split along axis 0 into batches of one, and one of a rank more
            has a sample axis in front (a scalar serves all samples); a folder of ``.npy`` for a model with
            one input, a file a sample, with or without the batch axis; `Images`, or a folder of images with
            a ``preprocess.toml`` in it (see `onnxopt.data.preprocess`); ``file.py:function`` or
            ``module:function``; a callable; an iterable of mappings; or one mapping.
        model: a path, bytes, a file object, a ModelProto or an ir.Model.

    Returns:
        A sequence of feeds. Arrays that are no input of the model are left out; float64 becomes float32, and
        int32 and int64 become each other, where the model asks for it and the values fit.

    Raises:
        UsageError: nothing there, not readable, an input without an array, or a wrong dtype or shape.
    """
    contract = contract_of(load(model))
    samples = _open(source, contract)
    if not len(samples):
        raise UsageError(f"--data: {_label(source)} holds no samples")
    samples[0]
    return samples


def _open(source: FeedSource, contract: Contract) -> Samples:
    if isinstance(source, Mapping):
        return _from_iterable([source], contract, "data")
    if isinstance(source, Images):
        return _from_images(source, contract)
    if callable(source):
        return _from_iterable(called(source, "data"), contract, "data")
    if not isinstance(source, str | os.PathLike):
        return _from_iterable(source, contract, "data")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, contract)
    if path.is_file() and path.suffix == ".npz":
        return _from_npz(path, contract)
    text = os.fspath(source)
    if not path.exists() and names_target(text):
        return _from_iterable(called(python_target(text), text), contract, text)
    found = "is neither a folder nor .npz" if path.exists() else "no such file or folder"
    raise UsageError(
        f"--data: {text}: {found}; give a folder of .npz, .npy or images, one .npz, or file.py:function"
    )


def _from_iterable(source: Iterable[Any], contract: Contract, who: str) -> Samples:
    items = source if isinstance(source, Sequence) else list(source)

    def read(number: int) -> Feeds:
        item = items[number]
        if not isinstance(item, Mapping):
            raise UsageError(
                f"{who}: sample {number} is a {type(item).__name__}; expected a dict, input name -> array"
            )
        return contract.check(item, f"{who}: sample {number}")

    return Samples(len(items), read)


def _from_folder(folder: Path, contract: Contract) -> Samples:
    files = sorted(folder.glob("*.npz"))
    if files:
        return Samples(len(files), lambda number: contract.check(_arrays(files[number]), str(files[number])))
    files = sorted(folder.glob("*.npy"))
    if not files:
        return _from_images(Images(folder), contract)
    item = contract.only(".npy")

    def read(number: int) -> Feeds:
        array = _array(files[number])
        lacks_batch = item.dims is not None and array.ndim == len(item.dims) - 1
        return contract.check({item.name: array[None] if lacks_batch else array}, str(files[number]))

    return Samples(len(files), read)


def _from_images(source: Images, contract: Contract) -> Samples:
    folder = Path(source.folder)
    files = image_files(folder)
    if not files:
        raise UsageError(f"--data: {folder}: the folder holds neither .npz nor .npy files, and no images")
    item, preprocess = contract.only("images"), source.preprocess
    if preprocess is None and (folder / PREPROCESS_FILE).is_file():
        preprocess = read_preprocess(folder / PREPROCESS_FILE)
    if preprocess is None:
        raise UsageError(
            f"--data: {folder}: images need their preprocessing stated, as it was in training: --preprocess "
            f'"{example_for(item)}" would fit input {item.name!r}; or {PREPROCESS_FILE} in the folder'
        )

    def read(number: int) -> Feeds:
        array = read_image(files[number], preprocess)
        lacks_batch = item.dims is not None and len(item.dims) == array.ndim
        return contract.check({item.name: array if lacks_batch else array[None]}, str(files[number]))

    return Samples(len(files), read)


def _from_npz(path: Path, contract: Contract) -> Samples:
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
        raise UsageError(f"--data: {path}: not a readable .npz: {told(error)}") from error


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--data: {path}: not a readable .npy: {told(error)}") from error
    return array


def _label(source: FeedSource) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the source"
