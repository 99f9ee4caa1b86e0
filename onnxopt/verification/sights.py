"""Whether an output can show a difference at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from onnxopt.verification.contract import Contract
from onnxopt.verification.distance import arrays_of, distance, is_float
from onnxopt.verification.verdict import Sight

__all__ = ["look"]


class _Sample(Protocol):
    @property
    def feeds(self) -> Mapping[str, Any]: ...
    @property
    def lowest(self) -> Mapping[str, Any]: ...
    @property
    def group(self) -> str: ...


def look(samples: Sequence[_Sample], contract: Contract, random: Collection[str]) -> dict[str, Sight]:
    """By output: ``compared``, or why equality on these samples says little.

    An output that no input reaches is constant by design and compared; one that an input reaches and that is
    the same for all samples, or all zero, is called what it is.
    """
    usual = [sample for sample in samples if sample.group != "overridden"]
    first = usual[0].feeds
    differ = any(not distance(first[name], other.feeds.get(name)).equal for other in usual for name in first)
    sights: dict[str, Sight] = {}
    for port in contract.outputs:
        name = port.name
        values = [sample.lowest[name] for sample in usual if name in sample.lowest]
        sights[name] = "random" if name in random else _look(values, name in contract.dependent, differ)
    return sights


def _look(values: Sequence[Any], dependent: bool, differ: bool) -> Sight:
    arrays = [array for value in values for array in arrays_of(value) if array is not None and array.size]
    if not arrays:
        return "empty"
    if not any(np.isfinite(a.astype(np.float64)).any() if is_float(a.dtype) else True for a in arrays):
        return "not finite"
    if not dependent:
        return "compared"
    if not any(np.any(array) for array in arrays):
        return "zero"
    if differ and all(distance(values[0], value).equal for value in values):
        return "constant"
    return "compared"
