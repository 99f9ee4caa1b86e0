"""Batches of a source: checked against the model's inputs, transformed, in a seeded order.

What batch number b of epoch e holds depends on the seed alone, not on what was read before: a resumed run
sees what it would have seen, and so do the processes of a parallel one, each its part.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from onnxopt.data import Feeds, Samples
from onnxopt.data.contract import Contract
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.synthesis.inputs import Input
from onnxopt.training.samples.sizes import Sizes
from onnxopt.training.samples.sources import Arrays, Ragged, Source, Stream, Table, batches_of, shuffled
from onnxopt.training.samples.transforms import Mixup, Transform, is_for

__all__ = ["Batch", "Dataset"]

_AHEAD = 2
"""Batches that are prepared while one is trained on, for each worker."""


@dataclass(frozen=True)
class Batch:
    """Some samples: all arrays by name, their rows in the source, and for mixup what each keeps of itself."""

    arrays: Arrays
    rows: np.ndarray
    size: int
    """How many samples count."""
    shares: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """A source as the inputs of a model and its labels."""

    source: Source
    contract: Contract
    labels: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()
    seed: int = 0
    workers: int = 1
    shuffle: int = 0
    """Of a stream, samples that are held to draw the next one of a batch from; 0: as they come."""
    chosen: np.ndarray | None = None
    """Rows that belong to it; None: all."""
    apart: bool = False
    """The model takes one sample at once, whatever its inputs say."""
    _inputs: dict[str, Input] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        items = {item.name: item for item in (*self.contract.required, *self.contract.optional)}
        object.__setattr__(self, "_inputs", items)

    @property
    def stacks(self) -> bool:
        """Whether samples go together along axis 0; else each is a feed of its own, and a piece of a batch.

        A state of shape [layers, batch, features] beside an input [batch, time] does not stack.
        """
        sizes = [item.dims[0] if item.dims else "" for item in self.contract.required if item.dims != ()]
        return not self.apart and len({size if isinstance(size, int) else "" for size in sizes}) < 2

    @property
    def fixed(self) -> int:
        """How many samples a run of the model takes; 0: any number."""
        sizes = [item.dims[0] for item in self.contract.required if item.dims]
        return next((n for n in sizes if isinstance(n, int)), 0) if self.stacks else 0

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
            raise UsageError(
                f"holdout {share:g}: of {self.length} samples some have to be left: give more, or 0"
            )
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
            parts = self._parts(index, part, pieces)
            return len(index), [self._batch(one, epoch, size) for one, size in parts]

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
        size = size if self.stacks else 1
        if isinstance(self.source, Stream):
            for count, take in self._recut(itertools.repeat(size)):
                yield self._made(take(np.arange(count)), np.arange(count), None, count)
            return
        for first in range(0, self.length or 0, size):
            rows = np.arange(first, min(first + size, self.length or 0))
            try:
                yield self._batch(rows, None, len(rows))
            except Ragged:
                yield from (self._batch(row, None, 1) for row in rows[:, None])

    def samples(self) -> Samples:
        """Complete feeds, as calibration takes them: of one sample each, or of as many as a run takes."""
        size, length = self.fixed or 1, self.length or 0

        def read(number: int) -> Feeds:
            rows = np.arange(number * size, (number + 1) * size) % length
            arrays = self._batch(rows, None, size).arrays
            return {name: array for name, array in arrays.items() if name in self._inputs}

        return Samples(-(-length // size), read)

    def _batch(self, index: np.ndarray, epoch: int | None, size: int) -> Batch:
        assert isinstance(self.source, Table)
        rows = index if self.chosen is None else self.chosen[index]
        return self._made(dict(self.source.rows(rows)), rows, epoch, size)

    def _made(self, arrays: Arrays, rows: np.ndarray, epoch: int | None, size: int) -> Batch:
        fitted, shares = self._fitted(arrays, epoch, rows), None
        mixes = [one for one in self.transforms if isinstance(one, Mixup)]
        if mixes and epoch is not None:
            shares = np.array(
                [self._random(epoch, row, 1).beta(mixes[0].alpha, mixes[0].alpha) for row in rows], np.float32
            )
        return Batch(fitted, rows, size, shares)

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
            array = given[name]
            if item.dims == () and array.ndim == 1 and (array == array[:1]).all():
                array = array[0]
            elif item.dims and array.ndim == len(item.dims) + 1:  # a sample axis in front of feeds
                array = array[0] if not self.stacks else array[:, 0] if array.shape[1] == 1 else array
            changes = [one for one in self.transforms if is_for(one, item, array)]
            if changes:
                array = array.astype(item.dtype) if array.dtype == np.uint8 else array
                pairs = zip(array if self.stacks else array[None], rows, strict=True)
                array = np.stack([self._changed(x, changes, epoch, row) for x, row in pairs])
            given[name] = array if self.stacks or not changes else array[0]
        feeds = (_any_batch(self.contract) if self.stacks else self.contract).check(given, "data")
        texts = [name for name, array in feeds.items() if array.dtype.kind in "OSU"]
        if texts:
            raise UsageError(f"data: input {texts[0]!r} is text: cut the graph where it has become numbers")
        labels = {name: given[name] for name in given if name in self.labels}
        for name, array in labels.items():
            if array.dtype.kind not in "fiub":
                raise UsageError(f"data: label {name!r} is of type {array.dtype}; expected numbers")
        return {**feeds, **labels}

    def _changed(
        self, x: np.ndarray, changes: Sequence[Transform], epoch: int | None, row: int
    ) -> np.ndarray:
        random = None if epoch is None else self._random(epoch, row, 0)
        for one in changes:
            x = one.applied(x, random)
        return x

    def _streamed(
        self, sizes: Sizes, epoch: int, epochs: int, start: int, part: tuple[int, int], pieces: int
    ) -> Iterator[tuple[int, list[Batch]]]:
        """The batches of a stream, cut anew to the sizes that are asked for."""
        first = 0
        random = np.random.default_rng((self.seed, epoch, 3)) if self.shuffle else None
        for number, (count, take) in enumerate(self._recut(sizes.of_epoch(epoch, epochs, None), random)):
            if number >= start:
                parts = self._parts(np.arange(count), part, pieces)
                yield count, [self._made(take(one), first + one, epoch, size) for one, size in parts]
            first += count

    def _parts(self, index: np.ndarray, part: tuple[int, int], pieces: int) -> list[tuple[np.ndarray, int]]:
        """What a process has of a batch, in pieces, and how many samples of each count.

        All processes have as many pieces, since they wait for each other in each; one that has no samples
        for a piece runs one that does not count.
        """
        own, most = np.array_split(index, part[1])[part[0]], -(-len(index) // part[1])
        found = np.array_split(own, min(pieces, most) if self.stacks else most)
        return [(one, len(one)) if len(one) else (index[:1], 0) for one in found]

    def _recut(
        self, sizes: Iterator[int], random: np.random.Generator | None = None
    ) -> Iterator[tuple[int, Callable[[np.ndarray], Arrays]]]:
        """The rows of a stream in batches of these sizes: how many, and what gives those of some numbers.

        random: what draws them from those that are held. The last has fewer, and so has one before rows of
        another shape.
        """
        assert isinstance(self.source, Stream)
        held: list[Arrays] = []
        size = next(sizes)
        given = batches_of(self.source, self.labels)
        rows = (row for arrays in given for row in (_rows(arrays) if self.stacks or self.apart else [arrays]))
        for row in rows if random is None else shuffled(rows, self.shuffle, random):
            if len(held) == size or (held and self.stacks and _shapes(row) != _shapes(held[0])):
                yield len(held), functools.partial(_joined, held)
                held, size = [], next(sizes)
            held.append(row)
        if held:
            yield len(held), functools.partial(_joined, held)


def _rows(arrays: Arrays) -> Iterator[Arrays]:
    """Each sample by itself; a scalar is of all of them."""
    for i in range(max((len(array) for array in arrays.values() if array.ndim), default=1)):
        yield {name: array[i : i + 1] if array.ndim else array for name, array in arrays.items()}


def _shapes(row: Arrays) -> list[tuple[int, ...]]:
    return [array.shape for array in row.values()]


def _joined(rows: Sequence[Arrays], index: np.ndarray) -> Arrays:
    chosen = [rows[int(i)] for i in index]
    if len(chosen) == 1:
        return dict(chosen[0])
    return {
        name: np.concatenate([one[name] for one in chosen]) if array.ndim else array
        for name, array in chosen[0].items()
    }


def _any_batch(contract: Contract) -> Contract:
    """The same but for the size of the first axis, which training is free to choose."""

    def freed(item: Input) -> Input:
        return dataclasses.replace(item, dims=("samples", *item.dims[1:])) if item.dims else item

    return Contract(tuple(map(freed, contract.required)), tuple(map(freed, contract.optional)))
