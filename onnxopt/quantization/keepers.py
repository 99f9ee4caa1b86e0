"""What keeps the accuracy of static quantization, in the order in which it is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from onnxopt.data import Feeds
from onnxopt.quantization.biases import correct_biases, measure_biases
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.rounding import round_weights
from onnxopt.quantization.scaling import equalize_layers, smooth_activations

__all__ = ["FIRST", "KEEPERS", "LAST", "Draft", "Keeper"]

Keeper = Callable[[Draft, Sequence[Feeds]], Draft | None]
"""From a draft and calibration samples to a better one; None where there is nothing to do."""

KEEPERS: Mapping[str, Keeper] = MappingProxyType(
    {
        "equalize-layers": equalize_layers,
        "smooth-activations": smooth_activations,
        "round-weights": round_weights,
        "correct-biases": correct_biases,
        "measure-biases": measure_biases,
    }
)
"""Each is to be kept only where samples that are held out say so."""

LAST = ("measure-biases",)
"""Those that hold for one choice of units, and come when that is known."""
FIRST = tuple(name for name in KEEPERS if name not in LAST)
"""Those that come before the choice, which depends on what they give."""
