"""Where labelled samples come from; none is read before it is asked for, and files are mapped if they can be.

A `Table` gives any rows by number; a `Stream` gives all rows once an epoch, in an order of its own.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.data import Preprocess, Samples, python_target, read_preprocess
from onnxopt.data.images import PREPROCESS_FILE, image_files, read_image
from onnxopt.data.python import names_target, told
from onnxopt.errors import UsageError

__all__ = ["Arrays", "Ragged", "Rows", "Source", "Stream", "Table", "batches_of", "open_source", "shuffled"]

Arrays = dict[str, np.ndarray]
"""Inputs and labels by name; the first axis of each is that of the samples."""


class Ragged(UsageError):  # noqa: N818 - so such samples are called
    """Samples that are asked for together do not go into one array."""


Rows = Callable[[np.ndarray], Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """`length` rows; `rows` gives those of an array of numbers."""

    length: int
    rows: Rows


@dataclass(frozen=True)
class Stream:
    """`start` gives the batches of an epoch, of any size: mappings, or pairs of inputs and labels."""

    start: Callable[[], Iterable[Any]]


Source = Table | Stream


def open_source(source: Any, *, labels: Sequence[str], preprocess: str | None = None) -> Source:
    """The samples of a source.

    Args:
        source: one ``.npz`` (arrays by name, mapped unless it is compressed); a folder of ``.npz``, a file
            a sample; a folder of ``.npy``, named as inputs and labels, mapped; a folder of folders of images,
            each a class; ``.csv``; ``file.py:function`` or ``module:function``; a folder of Hugging Face
            ``datasets``, or ``hf:NAME:SPLIT``; a callable that gives batches; a mapping of arrays; `Samples`;
            an iterable of batches such as a torch DataLoader; a Dataset of Hugging Face.
        labels: their names; images and CSV files give theirs the first one.
        preprocess: how images become arrays; by default ``preprocess.toml`` in the folder says it.

    Raises:
        UsageError: nothing there, or not readable.
    """
    label = labels[0] if labels else "label"
    if isinstance(source, Mapping):
        return _columns({name: np.asarray(array) for name, array in source.items()}, "data")
    if isinstance(source, Samples):
        return _items(len(source), source.__getitem__)
    if hasattr(source, "with_format"):
        return _hugging(source)
    if callable(source):
        return Stream(source)
    if not isinstance(source, str | os.PathLike):
        return _iterable(source)
    text, path = os.fspath(source), Path(source)
    if text.startswith("hf:"):
        name, _, part = text[3:].partition(":")
        library = _datasets(text)
        return _hugging(_told(lambda: library.load_dataset(name, split=part or "train")))
    if not path.exists() and names_target(text):
        return Stream(python_target(text))
    if path.is_dir():
        return _folder(path, label, preprocess)
    if path.suffix == ".npz" and path.is_file():
        return _columns(_read_npz(path), text)
    if path.suffix == ".csv" and path.is_file():
        return _columns(_read_csv(path, labels), text)
    found = "is neither a folder nor .npz nor .csv" if path.exists() else "no such file or folder"
    raise UsageError(f"--data: {text}: {found}; give those, a folder, hf:NAME:SPLIT or file.py:function")


def _columns(arrays: Mapping[str, np.ndarray], who: str) -> Table:
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name!r} {count}" for name, count in lengths.items())
        raise UsageError(f"--data: {who}: the arrays differ in their number of samples: {shown}")
    if not lengths or not max(lengths.values()):
        raise UsageError(f"--data: {who} holds no samples")
    return Table(
        max(lengths.values()),
        lambda index: {name: array[index] if array.ndim else array for name, array in arrays.items()},
    )


def _items(count: int, read: Callable[[int], Mapping[str, Any]]) -> Table:
    """A table of samples that are read one by one, each with a batch axis of its own."""

    def rows(index: np.ndarray) -> Arrays:
        samples = [read(int(number)) for number in index]
        if len(samples) == 1:
            return {name: np.atleast_1d(array) for name, array in samples[0].items()}
        try:
            whole = {name: [np.atleast_1d(one[name]) for one in samples] for name in samples[0]}
            return {name: np.concatenate(arrays) for name, arrays in whole.items()}
        except KeyError as error:
            raise UsageError(f"data: there is a sample without the array {error}") from None
        except ValueError as error:
            raise Ragged(f"data: samples that differ need batch_size=1: {told(error)}") from None

    return Table(count, rows)


def _iterable(source: Any) -> Stream:
    try:
        once = iter(source) is source
    except TypeError:
        raise UsageError(
            f"data: a {type(source).__name__} gives no samples; expected a path or batches"
        ) from None
    if once:
        raise UsageError("data: an iterator can be read once only: give a function that makes it, or a list")
    return Stream(lambda: source)


def _folder(folder: Path, label: str, preprocess: str | None) -> Source:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _hugging(_datasets(str(folder)).load_from_disk(str(folder)))
    files = sorted(folder.glob("*.npz"))
    if files:
        return _items(len(files), lambda number: _read_npz(files[number]))
    files = sorted(folder.glob("*.npy"))
    if files:
        return _columns({file.stem: _load(file) for file in files}, str(folder))
    return _images(folder, label, preprocess)


def _images(folder: Path, label: str, preprocess: str | None) -> Table:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, number) for number, one in enumerate(classes) for file in image_files(one)]
    if not files:
        raise UsageError(
            f"--data: {folder}: holds no .npz, no .npy and no folders of images, one for each class"
        )
    stated = folder / PREPROCESS_FILE
    if preprocess is None and not stated.is_file():
        raise UsageError(
            f"--data: {folder}: images need their preprocessing stated: preprocess = "
            f'"resize=256,crop=224,scale=1/255", or {PREPROCESS_FILE} in the folder'
        )
    steps: Preprocess = read_preprocess(preprocess if preprocess is not None else stated)

    def read(number: int) -> Arrays:
        file, kind = files[number]
        return {"": read_image(file, steps)[None], label: np.array([kind])}

    return _items(len(files), read)


def _read_npz(path: Path) -> Arrays:
    """The arrays of a .npz; those that are stored as they are stay on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _member(path, archive, info)
                for info in archive.infolist()
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"--data: {path}: not a readable .npz: {told(error)}") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array of a .npz, mapped where it can be. Its data follows a header of zip and one of npy."""
    if info.compress_type != zipfile.ZIP_STORED:
        return np.asarray(np.load(io.BytesIO(archive.read(info)), allow_pickle=False))
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        sizes = np.frombuffer(stream.read(4), "<u2")
        stream.seek(int(sizes.sum()), os.SEEK_CUR)
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, columns_first, dtype = header(stream)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        order = "F" if columns_first else "C"
        return np.memmap(path, dtype, "r", stream.tell(), shape, order)  # type: ignore[call-overload]


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--data: {path}: not a readable .npy: {told(error)}") from error
    return array


def _read_csv(path: Path, labels: Sequence[str]) -> Arrays:
    """Labels by their column; all other columns, in their order, are the row of the model's one input."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            head, *rows = [row for row in csv.reader(stream) if row] or [[]]
        for row in rows:
            if len(row) != len(head):
                raise ValueError(f"{len(row)} fields in {','.join(row)!r}, {len(head)} in the first line")
        table = np.array(rows, np.float64)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data: {path}: expected a line of names, then numbers: {told(error)}") from None
    missing = [name for name in labels if name not in head]
    if missing:
        raise UsageError(f"--data: {path}: there is no column {missing[0]!r}; it has {', '.join(head[:12])}")
    if not len(table):
        raise UsageError(f"--data: {path} holds no samples")
    found: Arrays = {
        "": table[:, [i for i, name in enumerate(head) if name not in labels]].astype(np.float32)
    }
    for name in labels:
        column = table[:, head.index(name)]
        whole = np.array_equal(column, np.rint(column))
        found[name] = column.astype(np.int64 if whole else np.float32)
    return found


def _datasets(text: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"--data: {text}: needs Hugging Face datasets: pip install 'onnxopt[datasets]'"
        ) from None
    return datasets


def _hugging(source: Any) -> Source:
    """A Dataset of Hugging Face, or an IterableDataset; columns are named as inputs and labels."""
    source = source.with_format("numpy")
    if not hasattr(source, "__len__"):
        return Stream(lambda: source.iter(batch_size=64))
    return Table(len(source), lambda index: source[index.tolist()])


def batches_of(stream: Stream, labels: Sequence[str]) -> Iterator[Arrays]:
    """One epoch of a stream, all arrays of a batch in one mapping; "" stands for the model's one input.

    Raises:
        UsageError: the user's code fails, or gives something else.
    """
    batches = _told(lambda: iter(stream.start()))
    while True:
        item = _told(lambda: next(batches, None))
        if item is None:
            return
        if isinstance(item, tuple | list) and len(item) == 2:
            feeds, targets = item
            item = {
                **(feeds if isinstance(feeds, Mapping) else {"": feeds}),
                **(targets if isinstance(targets, Mapping) else {(labels or ("label",))[0]: targets}),
            }
        if not isinstance(item, Mapping):
            raise UsageError(
                f"data: gives a {type(item).__name__}; expected a dict of arrays, or (inputs, labels)"
            )
        yield {name: np.asarray(array) for name, array in item.items()}


def shuffled(rows: Iterator[Arrays], size: int, random: np.random.Generator) -> Iterator[Arrays]:
    """All rows, each drawn from the `size` that are held; copies, that keep no batch alive."""
    held: list[Arrays] = []
    for row in rows:
        own = {name: array.copy() for name, array in row.items()}
        if len(held) < size:
            held.append(own)
            continue
        place = int(random.integers(size))
        yield held[place]
        held[place] = own
    for place in random.permutation(len(held)):
        yield held[place]


def _told(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UsageError(f"data: it failed to give samples: {told(error)}") from error
