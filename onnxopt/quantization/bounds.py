"""How near to the original outputs have to stay where the user gives no metric.

Scores (of classes, of detections) are read by their largest element or a threshold, and bear more noise than
signals: images and sounds, of which the noise is what one sees and hears, and the state of a recurrent model,
which is fed back, so that errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["SCORES_DB", "SIGNALS_DB", "required_db"]

SCORES_DB = 25.0
"""SQNR that outputs keep which are read as scores."""
SIGNALS_DB = 40.0
"""SQNR that signals keep, and what a model that carries state gives beside its scores."""

_SCORES = ("LogSoftmax", "Sigmoid", "Softmax")
"""Operators whose results are scores, however many."""
_MOVES = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def required_db(
    model: ir.Model, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, Any]
) -> dict[str, float]:
    """The SQNR in dB that each float output of a model has to keep.

    Args:
        model: the original.
        feeds, outputs: of one run, which tell sizes.

    A signal is at least as large as the largest float input. A model carries state where it has several float
    inputs and a float output of the very sizes of one of them.
    """
    ends = {value.name: value.producer() for value in model.graph.outputs}
    floats = [array for array in feeds.values() if array.dtype.kind == "f"]
    largest = max((array.size for array in floats), default=math.inf)
    states = {array.shape for array in floats if array.ndim > 1} if len(floats) > 1 else set()
    carries_state = any(_is_float(array) and array.shape in states for array in outputs.values())
    found = {}
    for name, array in outputs.items():
        signal = _is_float(array) and (carries_state or array.size >= largest)
        found[name] = SIGNALS_DB if signal and not _are_scores(ends.get(name)) else SCORES_DB
    return found


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _are_scores(node: ir.Node | None) -> bool:
    """Whether an output ends in an operator that makes scores, whatever moves them afterwards."""
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _SCORES
