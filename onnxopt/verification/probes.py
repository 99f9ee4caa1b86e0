"""Samples made from the given ones, to see what those leave unseen, and the size of a rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.synthesis.clues import clues_of
from onnxopt.verification.distance import is_float

__all__ = ["Group", "Trial", "nudged", "trials"]

Group = Literal["given", "overridden", "large"]
"""Where a sample comes from: from outside, with other initializers, or stretched. Each is judged apart."""

Feeds = Mapping[str, Any]

_LARGE = 1000.0
"""Beyond the bounds that graphs clip at: 6, 255, and those of inputs that are scaled down first."""


@dataclass(frozen=True)
class Trial:
    """What to run: the first of `choices` that the original runs on; each comes with a note, or none."""

    group: Group
    choices: tuple[tuple[Feeds, str], ...]
    what: str


def trials(model: ir.Model, feeds: Sequence[Feeds]) -> Iterator[Trial]:
    """The given samples, then what is made of the first of them."""
    for index, sample in enumerate(feeds):
        yield Trial("given", ((sample, ""),), f"sample {index}")
    if not feeds:
        return
    floats, others = _overrides(model)
    both = ({**feeds[0], **floats, **others}, "")
    without = ({**feeds[0], **floats}, f"the original does not run with other values of ({', '.join(others)})")
    choices = tuple(([both] if others else []) + ([without] if floats else []))
    if choices:
        yield Trial("overridden", choices if others else (({**feeds[0], **floats}, ""),), "the sample that overrides initializers")
    large = _stretched(model, feeds[0])
    if large is not None:
        yield Trial("large", ((large, ""),), "")
