"""Runs of models that carry state, with the state that came out of one step fed to the next.

What quantization does to a state is judged by what the state does: errors of a step are small in each output
and add up, or fade, over the steps that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxopt.data import Feeds
from onnxopt.metric import Run

__all__ = ["STEPS", "run_all", "states_of"]

STEPS = 8
"""Samples in a row whose state is carried on; then it is that of the sample again."""


def states_of(feeds: Feeds, outputs: Mapping[str, Any]) -> dict[str, str]:
    """Input -> output of each state of a model; empty where it has none, or where they cannot be told.

    Args:
        feeds, outputs: of one run, in the order of the graph.

    A state is a float input of another shape than the first float input, the signal; behind the first output,
    which is no state, there are as many outputs of its shape as there are such inputs, in their order.
    """
    inputs = {name: array for name, array in feeds.items() if _is_float(array)}
    signal = next(iter(inputs.values()), None)
    found: dict[str, str] = {}
    later = [name for name, array in list(outputs.items())[1:] if _is_float(array)]
    for shape in dict.fromkeys(array.shape for array in inputs.values() if array.ndim > 1):
        sources = [name for name, array in inputs.items() if array.shape == shape]
        results = [name for name in later if outputs[name].shape == shape]
        if signal is not None and shape != signal.shape and len(sources) == len(results):
            found |= zip(sources, results, strict=True)
    return found


def run_all(run: Run, samples: Sequence[Feeds], states: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What a model gives for each sample in turn.

    Args:
        run: from feeds to outputs.
        samples: complete feeds; where there are states, they count as steps, and after the last comes the
            first again, so that there are always whole runs of STEPS.
        states: of `states_of`. A state goes on where the next sample has one of the same shape.
    """
    outputs: dict[str, Any] = {}
    for number in range(-(-len(samples) // STEPS) * STEPS if states else len(samples)):
        feeds = dict(samples[number % len(samples)])
        if number % STEPS:
            feeds |= {i: outputs[o] for i, o in states.items() if outputs[o].shape == feeds[i].shape}
        outputs = run(feeds)
        yield outputs


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"
