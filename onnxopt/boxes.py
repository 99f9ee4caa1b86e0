"""Boxes of arrays: one slice (start and stop) for each axis; the order of elements, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = ["Box", "boxes", "gathered", "place", "runs"]

Box = tuple[slice, ...]

_SPAN = 1 << 24
"""Bytes that are read at once, at most."""
_GAP = 1 << 14
"""Bytes that are as fast to read as to pass over."""


def boxes(shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` elements that hold all elements of a shape, in order."""
    inner = math.prod(shape[1:])
    if not shape:
        yield ()
    elif inner <= limit:
        step = max(1, limit // max(1, inner))
        for start in range(0, shape[0] if inner else 0, step):
            yield (slice(start, min(start + step, shape[0])), *map(slice, [0] * (len(shape) - 1), shape[1:]))
    else:
        for row in range(shape[0]):
            yield from ((slice(row, row + 1), *box) for box in boxes(shape[1:], limit))


def runs(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Boxes that hold the elements from `start` to `stop`, in order: whole rows, and parts at both ends."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    row = start // inner
    first, last = -(-start // inner), stop // inner
    if first <= last:
        if row < first:
            yield from _row(shape, row, start - row * inner, inner)
        if first < last:
            yield (slice(first, last), *map(slice, [0] * (len(shape) - 1), shape[1:]))
        row, start = last, last * inner
    if start < stop:
        yield from _row(shape, row, start - row * inner, stop - row * inner)


def _row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    return ((slice(row, row + 1), *box) for box in runs(shape[1:], start, stop))


def place(shape: Sequence[int], box: Sequence[slice]) -> tuple[int, int]:
    """The number of a box's first element, in order, and how many lie from it to the last one."""
    first = span = 0
    step = 1
    for size, part in zip(reversed(shape), reversed(box), strict=True):
        first += part.start * step
        span += (part.stop - 1 - part.start) * step
        step *= size
    return first, span + 1


def gathered(
    dtype: np.dtype, shape: Sequence[int], box: Box, fetch: Callable[[int, np.ndarray], None]
) -> np.ndarray:
    """A box of a tensor that is read in runs of elements: `fetch` fills an array from a place on."""
    out = np.empty([part.stop - part.start for part in box], dtype)
    steps = np.cumprod([1, *shape[:0:-1]])[::-1][: len(shape)].tolist()
    first, _ = place(shape, box)

    def fill(part: np.ndarray, steps: list[int], first: int) -> None:
        while part.ndim and part.shape[0] == 1:
            part, steps = part.reshape(part.shape[1:]), steps[1:]
        span = 1 + sum((size - 1) * step for size, step in zip(part.shape, steps, strict=True))
        if span == part.size and span * dtype.itemsize <= _SPAN:
            fetch(first, part.reshape(-1))
            return
        run, axis = 1, part.ndim
        while axis and steps[axis - 1] == run:
            axis -= 1
            run *= part.shape[axis]
        near = (span - 2 * part.size) * dtype.itemsize <= part.size // run * _GAP
        if near and span * dtype.itemsize <= _SPAN:
            stretch = np.empty(span, dtype)
            fetch(first, stretch)
            strides = [step * dtype.itemsize for step in steps]
            part[...] = np.lib.stride_tricks.as_strided(stretch, part.shape, strides)
            return
        jump = -(-part.shape[0] // 2) if near else 1
        for index in range(0, part.shape[0], jump):
            fill(part[index : index + jump], steps, first + index * steps[0])

    if out.size:
        fill(out, steps, first)
    return out
