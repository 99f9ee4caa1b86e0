"""Which sizes to try for the dynamic axes of a graph's inputs, best guesses first."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.synthesis.clues import Clues
from onnxopt.synthesis.inputs import Dim, Input

__all__ = ["Axis", "Sizes", "assignments", "dynamic_axes", "override", "variations"]

Sizes = dict[str, int]
"""Name of a dynamic axis -> its size."""

_SPATIAL = (
    32, 48, 64, 96, 128, 160, 192, 224, 256, 16, 8, 320, 288, 512, 576, 640, 4, 2, 1, 3, 5, 7, 10, 20, 24, 28,
    40, 80, 100, 112, 299, 384, 400, 416, 480, 800, 1000, 1024, 2048, 4096, 8000, 16000,
)  # fmt: skip
_SEQUENCE = (
    16, 8, 32, 4, 2, 1, 3, 64, 128, 5, 6, 7, 10, 12, 20, 24, 40, 48, 50, 80, 96, 100, 160, 192, 224, 256, 288,
    320, 384, 400, 480, 512, 576, 640, 768, 800, 1000, 1024, 1536, 2048, 4096, 8000, 16000,
)  # fmt: skip
_BATCH = (1, 2, 3, 4, 8, 16)
_FIRST = 3
_MOST_TRIES = 400
_BATCH_NAME = re.compile(r"batch", re.IGNORECASE)
_LENGTH_NAME = re.compile(r"seq|len|time|frame|step|height|width|(^|_)[thw]$", re.IGNORECASE)


@dataclass(frozen=True)
class Axis:
    """One dynamic axis, shared by all inputs that name it."""

    name: str
    is_batch: bool
    candidates: tuple[int, ...]
    """Sizes to try, best first; a single one where the weights fix it."""


def override(inputs: Sequence[Input], shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[Input, ...], Sizes]:
    """The inputs with `shapes` in place of their declared shapes, and the sizes this gives to named axes.

    Raises:
        UsageError: an unknown input, a shape against the declared one, or two sizes for one name.
    """
    known = {item.name for item in inputs}
    for name in shapes:
        if name not in known:
            raise UsageError(f"--shape: the model has no input {name!r} to feed" + did_you_mean(name, known))
    fixed: Sizes = {}
    changed = []
    for item in inputs:
        shape = tuple(int(size) for size in shapes.get(item.name, ()))
        if item.name not in shapes:
            changed.append(item)
            continue
        if not item.accepts(shape) or any(size < 0 for size in shape):
            given = " x ".join(map(str, shape)) or "scalar"
            raise UsageError(f"--shape: input {item.name!r} is declared as {item.declared}, not {given}")
        for dim, size in zip(item.dims or (), shape, strict=False):
            if isinstance(dim, str) and fixed.setdefault(dim, size) != size:
                raise UsageError(
                    f"--shape: axis {dim!r} of input {item.name!r} is given as {fixed[dim]} and as {size}"
                )
        changed.append(Input(item.name, item.dtype, shape))
    return tuple(changed), fixed


def dynamic_axes(inputs: Sequence[Input], clues: Mapping[str, Clues], fixed: Mapping[str, int]) -> list[Axis]:
    """The axes whose size is still open, in the order of the inputs."""
    found: dict[str, Axis] = {}
    for item in inputs:
        dims = item.dims or ()
        pins = clues[item.name].pins
        for position, dim in enumerate(dims):
            pin = pins.get(position, pins.get(position - len(dims), {})) if isinstance(dim, str) else {}
            for name in _names(dim):
                if name not in fixed:
                    axis = _axis(item, position, name, clues[item.name].hints, pin)
                    found[name] = _merged(found.get(name), axis)
    return list(found.values())


def assignments(axes: Sequence[Axis], fixed: Mapping[str, int]) -> Iterator[Sizes]:
    """Sizes for all axes, a bounded number of different ones: first those that most models take."""
    seen: set[tuple[int, ...]] = set()
    for sizes in _ordered(axes):
        key = tuple(sizes[axis.name] for axis in axes)
        if key not in seen:
            seen.add(key)
            yield {**fixed, **sizes}
        if len(seen) >= _MOST_TRIES:
            return


def variations(axes: Sequence[Axis], base: Mapping[str, int]) -> Iterator[Sizes]:
    """Changes to sizes that work, each to be tried on top of those that worked.

    First 1 becomes 2; then the others become multiples that differ, so that no two axes can be mistaken for
    each other; then all are doubled, which keeps relations such as past + new = total; then one at a time.
    """
    free = [axis for axis in axes if len(axis.candidates) > 1]
    ones = {axis.name: 2 for axis in free if base[axis.name] == 1}
    rest = [axis.name for axis in free if base[axis.name] > 1]
    if ones:
        yield ones
    if len(rest) > 1:
        yield {name: (2 + index) * base[name] for index, name in enumerate(rest)}
        yield {name: 2 * base[name] for name in rest}
    for name in rest:
        yield {name: 2 * base[name]}
    for name in rest:
        yield {name: base[name] // 2}


def _names(dim: Dim) -> Iterable[str]:
    if isinstance(dim, str):
        return [dim]
    return sorted(dim.free_symbols()) if isinstance(dim, ir.SymbolicDim) else []


def _axis(item: Input, position: int, name: str, hints: Sequence[int], pins: Iterable[int]) -> Axis:
    if pins:
        return Axis(name, False, tuple(pins))
    dims = item.dims or ()
    named = name != f"{item.name}[{position}]"
    is_batch = position == 0 and len(dims) > 1 and not (named and _LENGTH_NAME.search(name))
    is_batch = is_batch or (named and _BATCH_NAME.search(name) is not None)
    others = math.prod(dim for dim in dims if isinstance(dim, int))
    derived = (number for hint in hints for number in _derived(hint, others))
    if is_batch:
        usual: tuple[int, ...] = _BATCH
    else:
        usual = _SPATIAL if len(dims) > 3 or (len(dims) == 3 and position == 2) else _SEQUENCE
    return Axis(name, is_batch, tuple(dict.fromkeys((*usual[:_FIRST], *derived, *usual[_FIRST:]))))


def _derived(hint: int, others: int) -> Iterator[int]:
    """What an axis may be where a flattened input has `hint` elements: alone, or as one of two equal ones."""
    yield hint
    if others > 1 and hint % others == 0:
        yield hint // others
    root = math.isqrt(hint // max(others, 1))
    if root > 1 and root * root * others == hint:
        yield root


def _merged(first: Axis | None, second: Axis) -> Axis:
    """One axis out of two inputs' views of it: a weight's word counts most, then a batch axis."""
    if first is None or len(second.candidates) == 1:
        return second
    if len(first.candidates) == 1 or first.is_batch or not second.is_batch:
        return first
    return second


def _ordered(axes: Sequence[Axis]) -> Iterator[Sizes]:
    pinned = {axis.name: axis.candidates[0] for axis in axes if len(axis.candidates) == 1}
    batch = {axis.name: 1 for axis in axes if axis.is_batch}
    rest = [axis for axis in axes if axis.name not in pinned and axis.name not in batch]
    lone = {**pinned, **batch}
    common = _interleaved(axis.candidates for axis in rest)
    for size in common[:_FIRST] or [1]:
        yield lone | {axis.name: size for axis in rest}
    for axis, size in itertools.product(rest, common[:_FIRST]):
        yield lone | {other.name: size for other in rest} | {axis.name: 2 * size}
    for size in common[_FIRST:]:
        yield lone | {axis.name: size for axis in rest}
    for index in range(max((len(axis.candidates) for axis in rest), default=0)):
        for axis in rest:
            if index < len(axis.candidates):
                yield lone | {other.name: 1 for other in rest} | {axis.name: axis.candidates[index]}
    several = _interleaved(axis.candidates for axis in axes if axis.is_batch)
    for size, other in itertools.product(several, common[:_FIRST] or [1]):
        yield pinned | dict.fromkeys(batch, size) | {axis.name: other for axis in rest}
    for left, right in itertools.combinations(rest, 2):
        pairs = itertools.product(left.candidates[:16], right.candidates[:16])
        for one, two in sorted(pairs, key=sum):
            yield lone | {axis.name: common[0] for axis in rest} | {left.name: one, right.name: two}


def _interleaved(lists: Iterable[tuple[int, ...]]) -> list[int]:
    """All numbers, first those that stand first in any list."""
    rows = itertools.zip_longest(*lists)
    return list(dict.fromkeys(number for row in rows for number in row if number is not None))
