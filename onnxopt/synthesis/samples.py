"""Valid and telling feeds for a model nobody gave data for, made from the graph's own constraints.

Values: indices stay inside the tables they look up, numbers compared with constants take these constants,
masks are mostly ones, floats go through several scales. Sizes: the runtime is asked, guess by guess, which
sizes of the dynamic axes the graph takes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxopt.errors import NoSamplesError, RuntimeMissingError
from onnxopt.model import ModelLike, load
from onnxopt.runtimes import RunError, Session, UnsupportedModelError, open_session
from onnxopt.synthesis.clues import Clues, clues_of
from onnxopt.synthesis.inputs import Input, required_inputs, resolve
from onnxopt.synthesis.sizes import Axis, Sizes, assignments, dynamic_axes, override, variations

__all__ = ["synthesize"]

_NO_SHAPES: Mapping[str, Sequence[int]] = MappingProxyType({})
_MASK_NAME = re.compile(r"mask", re.IGNORECASE)
_WORDS = np.array(["a", "onnx", "hello world", "42", "Zürich"], object)
_MANY_ELEMENTS = 1 << 22
_MOST_TURNS = 4
_SIGNED_SAMPLE = 3
"""Where integers may be negative, if the model takes that: they might still be lengths or positions."""


def synthesize(
    model: ModelLike,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int = 4,
) -> list[dict[str, np.ndarray]]:
    """Make `samples` complete feeds that the model takes, the same ones for the same model and seed.

    Where the runtime opens the model, each sample has run on it; where it cannot (it lacks a kernel, or is
    not installed) the feeds are the best guess. Dynamic axes differ between samples where the graph allows.
    Inputs with a default (overridable initializers) are left out.

    Args:
        model: a path, bytes, a file object, a ModelProto or an ir.Model.
        seed: picks the values; each array depends on it, the sample's number and the input's name only.
        shapes: input name -> shape, in place of what the model leaves open.
        samples: how many feeds.

    Returns:
        One dict per sample, input name -> array of the input's dtype (object for strings).

    Raises:
        NoSamplesError: no valid feed was found, or an input is no tensor.
        UsageError: `shapes` contradicts the model.
        ModelError: `model` is no usable model.
    """
    loaded = load(model)
    clues = clues_of(loaded)
    inputs, fixed = override(required_inputs(loaded), shapes or _NO_SHAPES)
    maker = _Maker(inputs, clues, seed)
    axes = dynamic_axes(inputs, clues, fixed)
    source = model if isinstance(model, str | os.PathLike | bytes) else loaded
    try:
        session = open_session(source, level="none")
    except (UnsupportedModelError, RuntimeMissingError):
        sizes = next(assignments(axes, fixed))
        return [maker.feeds(sample, sample, sizes) for sample in range(samples)]
    with session:
        search = _Search(session, maker, axes, fixed, vary=samples > 1)
        return [search.sample(number) for number in range(samples)]


@dataclass(frozen=True)
class _Maker:
    """Draws the values of a sample, given the sizes of the dynamic axes."""

    inputs: tuple[Input, ...]
    clues: Mapping[str, Clues]
    seed: int

    @property
    def turns(self) -> int:
        """How many values the single numbers that choose a branch go through, at most 4."""
        counts = [len(_options(item, self.clues[item.name])) for item in self.inputs]
        return min(max([1, *counts]), _MOST_TURNS)

    def elements(self, sizes: Sizes) -> int:
        return sum(math.prod(item.shape(sizes)) for item in self.inputs)

    def feeds(self, sample: int, turn: int, sizes: Sizes, *, signed: bool = False) -> dict[str, np.ndarray]:
        """`turn` picks what single numbers choose a branch; all else follows `sample`.

        `signed` lets integers that nothing limits be negative.
        """
        return {item.name: self._array(item, sample, turn, sizes, signed) for item in self.inputs}

    def _array(self, item: Input, sample: int, turn: int, sizes: Sizes, signed: bool) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}:{sample}:{item.name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        shape = item.shape(sizes)
        options = _options(item, self.clues[item.name])
        if options and len(shape) < 2 and math.prod(shape) == 1:
            values: Any = np.full(shape, options[turn % len(options)])
        else:
            values = _draw(item, self.clues[item.name], shape, sizes, rng, sample, signed)
        return np.asarray(values).reshape(shape).astype(item.dtype)


@dataclass
class _Search:
    """Finds sizes the session accepts, and remembers them: each new sample prefers those used least."""

    session: Session
    maker: _Maker
    axes: list[Axis]
    fixed: Sizes
    vary: bool
    """Whether to look for more than one set of sizes."""
    accepted: list[Sizes] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)
    hopeless: set[int] = field(default_factory=set)
    complaint: str = ""

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """The feed of sample `number`, which has run.

        Raises:
            NoSamplesError: nothing that was tried runs; the message has the runtime's last complaint.
        """
        turns = self.maker.turns
        for turn in dict.fromkeys((number + step) % turns for step in range(turns)):
            if turn in self.hopeless:
                continue
            for index, sizes in self._proposals():
                feeds = self._try(number, turn, sizes)
                if feeds is not None:
                    self._remember(index, sizes, number, turn)
                    return feeds
            self.hopeless.add(turn)
        names = ", ".join(f"{item.name} ({item.declared})" for item in self.maker.inputs)
        raise NoSamplesError(
            f"no valid synthetic input found for {names}: {self.complaint}; give --shape name=AxBxC or --data"
        )

    def _proposals(self) -> Iterator[tuple[int, Sizes]]:
        """Accepted sizes, least used first, then the whole search; the index is that in `accepted`."""
        known = sorted(range(len(self.accepted)), key=lambda index: (self.uses[index], index))
        yield from [(index, self.accepted[index]) for index in known]
        for sizes in assignments(self.axes, self.fixed):
            if sizes not in self.accepted:
                yield len(self.accepted), sizes

    def _remember(self, index: int, sizes: Sizes, number: int, turn: int) -> None:
        self.uses[index] += 1
        if index < len(self.accepted):
            return
        self.accepted.append(sizes)
        varied = dict(sizes)
        for change in variations(self.axes, sizes) if self.vary else ():
            same = all(varied[name] == sizes[name] for name in change)
            if same and self._try(number, turn, varied | change) is not None:
                varied |= change
        if varied != sizes:
            self.accepted.append(varied)

    def _try(self, number: int, turn: int, sizes: Sizes) -> dict[str, np.ndarray] | None:
        smallest = self.maker.elements(self.fixed | {axis.name: min(axis.candidates) for axis in self.axes})
        if self.maker.elements(sizes) > max(_MANY_ELEMENTS, 2 * smallest):
            return None
        for signed in dict.fromkeys((number == _SIGNED_SAMPLE, False)):
            feeds = self.maker.feeds(number, turn, sizes, signed=signed)
            try:
                self.session.run(feeds)
            except RunError as error:
                self.complaint = str(error)
            else:
                return feeds
        return None


def _options(item: Input, clues: Clues) -> list[int]:
    """The values that an input of one number goes through; [] where it is drawn like any other."""
    if item.dtype.kind == "b":
        return [1, 0]
    if item.dtype.kind not in "iu" or clues.limits or clues.spans or not clues.compared:
        return []
    options = [number for number in clues.compared if number >= 0] or clues.compared
    if len(options) > 1:
        return options
    return [options[0], options[0] // 2 if options[0] > 1 else options[0] + 1]


def _draw(
    item: Input,
    clues: Clues,
    shape: tuple[int, ...],
    sizes: Sizes,
    rng: np.random.Generator,
    sample: int,
    signed: bool,
) -> np.ndarray:
    kind = item.dtype.kind
    if kind == "O":
        return rng.choice(_WORDS, shape)
    if clues.limits:
        low, high = _index_range(clues, sizes, item)
        return rng.integers(low, high, shape, endpoint=True)
    if kind == "b" or clues.is_mask or _MASK_NAME.search(item.name) or _compares_bits(clues, shape, kind):
        return _mask(shape, rng, sample)
    if clues.infers_shape:
        target = np.ones(shape)
        target.flat[-1:] = -1
        return target
    if clues.spans:
        low, high = max(low for low, _ in clues.spans), min(high for _, high in clues.spans)
        return rng.integers(low, max(low, high), shape, endpoint=True)
    if kind in "iu":
        options = _options(item, clues)
        low, high = _plain_range(item, signed and not clues.is_positive)
        return rng.choice(options, shape) if options else rng.integers(low, high, shape, endpoint=True)
    if kind == "c":
        return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return _floats(shape, rng, sample, clues.is_positive)


def _floats(shape: tuple[int, ...], rng: np.random.Generator, sample: int, positive: bool) -> np.ndarray:
    """Standard normal, uniform in [0, 1), normal times 3, in turn; all above zero where they must be."""
    values = (rng.standard_normal(shape), rng.random(shape), 3 * rng.standard_normal(shape))[sample % 3]
    return np.abs(values) + 0.1 if positive else values


def _index_range(clues: Clues, sizes: Sizes, item: Input) -> tuple[int, int]:
    """Lowest and highest value for which each table is hit inside, without negative values where possible."""
    low, high = -math.inf, math.inf
    for limit in clues.limits:
        first = -limit.offset / limit.scale
        last = (resolve(limit.size, sizes) - 1 - limit.offset) / limit.scale
        low, high = max(low, min(first, last)), min(high, max(first, last))
    if item.dtype.kind in "iu":
        high = min(high, _largest(item))
    bottom, top = math.ceil(low - 1e-6), math.floor(high + 1e-6)
    bottom = max(bottom, 0) if top >= 0 else bottom
    return min(bottom, top), top


def _plain_range(item: Input, signed: bool) -> tuple[int, int]:
    """For integers nobody looks up: every value of a byte, 0 to 9 of wider ones, or -9 to 9."""
    if item.dtype.itemsize > 1:
        return (-9 if signed and item.dtype.kind == "i" else 0), 9
    return (0 if item.dtype.kind == "u" else -_largest(item) - 1), _largest(item)


def _largest(item: Input) -> int:
    return int(np.iinfo(item.dtype).max)


def _compares_bits(clues: Clues, shape: tuple[int, ...], kind: str) -> bool:
    return kind in "iu" and bool(shape) and bool(clues.compared) and set(clues.compared) <= {-1, 0, 1}


def _mask(shape: tuple[int, ...], rng: np.random.Generator, sample: int) -> np.ndarray:
    """Ones, then zeros at the end of the last axis with room for both: at most 40 % of a row.

    In odd samples a row may be all ones.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if not axes:
        return np.ones(shape)
    axis = axes[-1]
    size = shape[axis]
    rows = [1 if position == axis else length for position, length in enumerate(shape)]
    most = size - 1 + sample % 2
    ones = rng.integers(min(math.ceil(0.6 * size), size - 1), most, rows, endpoint=True)
    steps = [size if position == axis else 1 for position in range(len(shape))]
    return np.arange(size).reshape(steps) < ones
