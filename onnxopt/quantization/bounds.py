"""How near to the original outputs have to stay where the user gives no metric.

Scores (of classes, of detections) are read by their largest element or a threshold, and bear more noise than
signals: images and sounds, of which the noise is what one sees and hears. The state of a recurrent model is
judged by what it does to the outputs of the steps that follow. Where it cannot be told which it is, it counts
as a signal, and so does all beside it, as errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["SCORES_DB", "SIGNALS_DB", "required_db"]

SCORES_DB = 25.0
"""SQNR that outputs keep which are read as scores, and state in a run of several steps."""
SIGNALS_DB = 40.0
"""SQNR that signals keep, and what a model gives beside its scores that carries state unseen."""

_SCORES = ("LogSoftmax", "Sigmoid", "Softmax")
"""Operators whose results are scores, however many."""
_MOVES = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def required_db(
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    outputs: Mapping[str, Any],
    states: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, float]:
    """The SQNR in dB that each float output of a model has to keep.

    Args:
        model: the original.
        feeds, outputs: of one run, which tell sizes.
        states: of `unrolled.states_of`, which the run that is judged carries on.

    A signal is at least as large as the largest float input that is no state. Without known states, a model
    counts as carrying one where it has several float inputs and a float output of the sizes of one of them.
    """
    ends = {value.name: value.producer() for value in model.graph.outputs}
    floats = [array for name, array in feeds.items() if name not in states and array.dtype.kind == "f"]
    largest = max((array.size for array in floats), default=math.inf)
    shapes = {array.shape for array in floats if array.ndim > 1} if len(floats) > 1 else set()
    carries_state = any(_is_float(array) and array.shape in shapes for array in outputs.values())
    carried = frozenset(states.values())
    found = {}
    for name, array in outputs.items():
        signal = _is_float(array) and (carries_state or array.size >= largest) and name not in carried
        found[name] = SIGNALS_DB if signal and not _are_scores(ends.get(name)) else SCORES_DB
    return found


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _are_scores(node: ir.Node | None) -> bool:
    """Whether an output ends in an operator that makes scores, whatever moves them afterwards."""
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _SCORES
