"""Samples made from a given one, to see what it leaves unseen, and how much a rounding matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.synthesis.clues import Clues, clues_of
from onnxopt.verification.distance import float_info, is_float

__all__ = ["Feeds", "Group", "Probe", "nudged", "probes"]

Feeds = Mapping[str, Any]
Group = Literal["given", "overridden", "large"]
"""Where a sample comes from: from outside, with other initializers, or stretched. Each is judged apart."""

_LARGE = 1000.0
"""Beyond the bounds that graphs clip at, 6 or 255, also where inputs are scaled down on the way there."""


@dataclass(frozen=True)
class Probe:
    """A sample to run, and its name for messages."""

    group: Group
    feeds: Feeds
    name: str


def probes(model: ir.Model, feeds: Feeds) -> Iterator[Probe]:
    """Initializers that may be overridden take other values, floats apart from others; floats grow large."""
    floats: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        tensor = value.const_value if value.is_initializer() else None
        if value.name and tensor is not None and tensor.dtype != ir.DataType.STRING:
            array = tensor.numpy()
            changed = np.asarray(_changed(array))
            if not np.array_equal(changed, array):
                (floats if is_float(array.dtype) else others)[value.name] = changed
    if floats:
        yield Probe("overridden", {**feeds, **floats}, f"the sample with other values of {_shown(floats)}")
    if others:
        yield Probe("overridden", {**feeds, **others}, f"the sample with other values of {_shown(others)}")
    clues = clues_of(model)
    large = {name: _stretched(array, clues.get(name)) for name, array in feeds.items()}
    if any(large[name] is not feeds[name] for name in large):
        yield Probe("large", large, "the sample with large floats")


def nudged(feeds: Feeds, seed: int = 0) -> Feeds:
    """Each float 1 to 2 units in the last place further from zero, so that whole numbers stay what they are.

    The same factor for all would go unseen where the model normalizes.
    """
    rng = np.random.default_rng(seed)
    moved = dict(feeds)
    for name, array in feeds.items():
        if isinstance(array, np.ndarray) and is_float(array.dtype):
            step = float(float_info(array.dtype).eps)
            factor = 1 + step * rng.integers(1, 2, array.shape, endpoint=True)
            moved[name] = np.asarray(array.astype(np.float64) * factor).astype(array.dtype)
    return moved


def _changed(array: np.ndarray) -> np.ndarray:
    """Floats a little off their default; others reversed, so that indices and axes stay valid."""
    if is_float(array.dtype):
        return np.asarray(array.astype(np.float64) * 1.01 + 0.01).astype(array.dtype)
    return np.logical_not(array) if array.dtype == bool else np.flip(array)


def _stretched(array: Any, clues: Clues | None) -> Any:
    """Floats with their peak at 1000, and half of them negative unless a root or a logarithm reads them.

    The same object where it is no float, or steers an operator.
    """
    if not isinstance(array, np.ndarray) or not is_float(array.dtype):
        return array
    if clues is None or clues.limits or clues.spans or clues.is_mask:
        return array
    wide = array.astype(np.float64)
    peak = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
    if not peak:
        return array
    wide *= _LARGE / peak
    if not clues.is_positive and array.size > 1:
        negative = np.random.default_rng(0).permutation(array.size) % 2 == 1
        wide = np.where(negative.reshape(array.shape), -np.abs(wide), np.abs(wide))
    return wide.astype(array.dtype)


def _shown(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
