"""Batches of a source: checked against the model's inputs, transformed, in a seeded order.

What batch number b of epoch e holds depends on the seed alone, not on what was read before: a resumed run
sees what it would have seen, and so do the processes of a parallel one, each its part.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from onnxopt.data import Feeds, Samples
from onnxopt.data.contract import Contract
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.synthesis.inputs import Input
from onnxopt.training.schedules import Clock, Schedule
from onnxopt.training.sources import Arrays, Source, Stream, Table, batches_of
from onnxopt.training.transforms import Mixup, Transform

__all__ = ["Batch", "Dataset", "Sizes", "parse_sizes"]

_AHEAD = 2
"""Batches that are prepared while one is trained on, for each worker."""


@dataclass(frozen=True)
class Batch:
    """Some samples: all arrays by name, their rows in the source, and for mixup what each keeps of itself."""

    arrays: Arrays
    rows: np.ndarray
    shares: np.ndarray | None = None

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.rows)


@dataclass(frozen=True)
class Sizes:
    """How many samples a step sees: from `low` to `high`, drawn at random, times a schedule over epochs.

    None: all of them.
    """

    low: int
    high: int
    schedule: Schedule
    seed: int

    def of_epoch(self, epoch: int, epochs: int, count: int | None) -> Iterator[int]:
        """The size of each batch of an epoch; `count` is that of all samples, None where it is not known."""
        random = np.random.default_rng((self.seed, epoch, 1))
        factor = self.schedule(Clock(step=epoch, total=epochs, epoch=epoch))
        left = count
        while left is None or left > 0:
            drawn = int(random.integers(self.low, self.high + 1)) if self.low < self.high else self.low
            size = max(round(drawn * factor), 1) if drawn else (left or 1)
            yield size if left is None else min(size, left)
            left = None if left is None else left - size


def parse_sizes(text: str | int, schedule: Schedule, seed: int) -> Sizes:
    """``32``, ``16-64`` (random), ``full``. Raises UsageError."""
    low, dash, high = str(text).partition("-")
    if text == "full":
        return Sizes(0, 0, schedule, seed)
    if not low.isdigit() or (dash and not high.isdigit()) or not 0 < int(low) <= int(high or low):
        raise UsageError(f"batch_size {text!r}: expected a number, a range such as 16-64, or full")
    return Sizes(int(low), int(high or low), schedule, seed)


@dataclass(frozen=True)
class Dataset:
    """A source as the inputs of a model and its labels."""

    source: Source
    contract: Contract
    labels: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()
    seed: int = 0
    workers: int = 1
    chosen: np.ndarray | None = None
    """Rows that belong to it; None: all."""
    _inputs: dict[str, Input] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        items = {item.name: item for item in (*self.contract.required, *self.contract.optional)}
        object.__setattr__(self, "_inputs", items)

    @property
    def length(self) -> int | None:
        """How many samples there are; None: as many as the stream gives."""
        if isinstance(self.source, Stream):
            return None
        return self.source.length if self.chosen is None else len(self.chosen)

    def split(self, share: float) -> tuple[Dataset, Dataset | None]:
        """Two datasets, the second of a random `share` of the rows; None where that is 0."""
        if not share:
            return self, None
        if self.length is None:
            raise UsageError(
                "validation: a stream cannot be split: give samples of their own with validation="
            )
        held = max(round(self.length * share), 1)
        if not 0 < share < 1 or held >= self.length:
            raise UsageError(f"holdout {share:g}: expected a share of the {self.length} samples, such as 0.1")
        order = np.random.default_rng((self.seed, 0, 2)).permutation(self.length)
        first, second = np.sort(order[held:]), np.sort(order[:held])
        return dataclasses.replace(self, chosen=first), dataclasses.replace(self, chosen=second)

    def steps(self, sizes: Sizes, epochs: int) -> int:
        """How many batches there are in all epochs; 0 for a stream."""
        if self.length is None:
            if not sizes.high:
                raise UsageError("batch_size full: a stream has no length: give a number")
            return 0
        return sum(1 for epoch in range(epochs) for _ in sizes.of_epoch(epoch, epochs, self.length))

    def batches(
        self,
        sizes: Sizes,
        epoch: int,
        epochs: int,
        *,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        pieces: int = 1,
    ) -> Generator[tuple[int, list[Batch]]]:
        """From batch number `start` of an epoch on: the size of each, and this process's pieces of it.

        part: number of the process, and how many there are. pieces: how many a process runs one by one.
        """
        if isinstance(self.source, Stream):
            yield from self._streamed(sizes, epoch, epochs, start, part, pieces)
            return
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(self.length or 0)
        cuts = np.cumsum([0, *sizes.of_epoch(epoch, epochs, self.length)])
        wanted = [order[a:b] for a, b in zip(cuts[start:], cuts[start + 1 :], strict=False)]

        def read(index: np.ndarray) -> tuple[int, list[Batch]]:
            return len(index), [self._batch(one, epoch) for one in _parts(index, part, pieces)]

        if not self.workers:
            yield from map(read, wanted)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            ready: deque[Future[tuple[int, list[Batch]]]] = deque()
            for index in wanted:
                ready.append(pool.submit(read, index))
                if len(ready) > _AHEAD * self.workers:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()

    def evaluated(self, size: int) -> Iterator[Batch]:
        """All samples in their order, transformed without chance, in batches of at most `size`."""
        if isinstance(self.source, Stream):
            for arrays in _recut(batches_of(self.source, self.labels), itertools.repeat(size)):
                yield self._made(arrays, np.arange(_length(arrays)), None)
            return
        for first in range(0, self.length or 0, size):
            yield self._batch(np.arange(first, min(first + size, self.length or 0)), None)

    def samples(self) -> Samples:
        """Complete feeds of one sample each, as calibration takes them."""
        names = self._inputs

        def read(number: int) -> Feeds:
            arrays = self._batch(np.array([number]), None).arrays
            return {name: array for name, array in arrays.items() if name in names}

        return Samples(self.length or 0, read)

    def _batch(self, index: np.ndarray, epoch: int | None) -> Batch:
        assert isinstance(self.source, Table)
        rows = index if self.chosen is None else self.chosen[index]
        return self._made(dict(self.source.rows(rows)), rows, epoch)

    def _made(self, arrays: Arrays, rows: np.ndarray, epoch: int | None) -> Batch:
        fitted, shares = self._fitted(arrays, epoch, rows), None
        mixes = [one for one in self.transforms if isinstance(one, Mixup)]
        if mixes and epoch is not None:
            shares = np.array(
                [self._random(epoch, row, 1).beta(mixes[0].alpha, mixes[0].alpha) for row in rows], np.float32
            )
        return Batch(fitted, rows, shares)

    def _random(self, epoch: int, row: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, int(row), purpose))

    def _fitted(self, arrays: Arrays, epoch: int | None, rows: Sequence[int] | np.ndarray) -> Arrays:
        """The arrays as the model takes them, with any number of samples along the first axis."""
        if "" in arrays:
            arrays = {self.contract.only("arrays without names").name: arrays.pop(""), **arrays}
        missing = [name for name in self.labels if name not in arrays]
        if missing:
            hint = did_you_mean(missing[0], arrays) or f" (there are {', '.join(arrays)})"
            raise UsageError(f"data: no array for label {missing[0]!r}{hint}")
        given = {name: np.asarray(array) for name, array in arrays.items()}
        for name, item in self._inputs.items():
            if name not in given:
                continue
            if item.dims is not None and given[name].ndim == len(item.dims) + 1 and given[name].shape[1] == 1:
                given[name] = given[name][:, 0]  # a sample axis in front of complete feeds
            changes = [one for one in self.transforms if _is_for(one, item, given[name])]
            if changes:
                array = given[name].astype(item.dtype) if given[name].dtype == np.uint8 else given[name]
                pairs = zip(array, rows, strict=True)
                given[name] = np.stack([self._changed(x, changes, epoch, row) for x, row in pairs])
        feeds = _any_batch(self.contract).check(given, "data")
        return {**feeds, **{name: given[name] for name in given if name in self.labels}}

    def _changed(
        self, x: np.ndarray, changes: Sequence[Transform], epoch: int | None, row: int
    ) -> np.ndarray:
        random = None if epoch is None else self._random(epoch, row, 0)
        for one in changes:
            x = one(x, random)
        return x

    def _streamed(
        self, sizes: Sizes, epoch: int, epochs: int, start: int, part: tuple[int, int], pieces: int
    ) -> Iterator[tuple[int, list[Batch]]]:
        """The batches of a stream, cut anew to the sizes that are asked for."""
        assert isinstance(self.source, Stream)
        wanted, first = sizes.of_epoch(epoch, epochs, None), 0
        for number, arrays in enumerate(_recut(batches_of(self.source, self.labels), wanted)):
            size = _length(arrays)
            rows, first = np.arange(first, first + size), first + size
            if number < start:
                continue
            own = _parts(np.arange(size), part, pieces)
            taken = [({name: array[one] for name, array in arrays.items()}, rows[one]) for one in own]
            yield size, [self._made(some, numbers, epoch) for some, numbers in taken]


def _parts(index: np.ndarray, part: tuple[int, int], pieces: int) -> list[np.ndarray]:
    """What a process has of a batch, in pieces; none is empty, but one may be no more than an axis of 0."""
    own = np.array_split(index, part[1])[part[0]]
    return [one for one in np.array_split(own, pieces) if len(one)] or [own]


def _recut(batches: Iterable[Arrays], sizes: Iterator[int]) -> Iterator[Arrays]:
    """The same rows in batches of these sizes; the last may have fewer."""
    held: Arrays = {}
    size = next(sizes)
    for arrays in batches:
        held = {name: np.concatenate([held[name], new]) for name, new in arrays.items()} if held else arrays
        while _length(held) >= size:
            yield {name: array[:size] for name, array in held.items()}
            held = {name: array[size:] for name, array in held.items()}
            size = next(sizes)
    if held and _length(held):
        yield held


def _length(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _any_batch(contract: Contract) -> Contract:
    """The same but for the size of the first axis, which training is free to choose."""

    def freed(item: Input) -> Input:
        return dataclasses.replace(item, dims=("samples", *item.dims[1:])) if item.dims else item

    return Contract(tuple(map(freed, contract.required)), tuple(map(freed, contract.optional)))


def _is_for(one: Transform, item: Input, array: np.ndarray) -> bool:
    if one.input:
        return one.input == item.name
    return array.ndim > 2 and item.dtype.kind == "f" and (array.dtype.kind == "f" or array.dtype == np.uint8)
