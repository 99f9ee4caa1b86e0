"""What is to be quantized, and with which numbers; read and written as a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxopt.quantization.formats import Format, QuantParams, find_format, params_from_range
from onnxopt.quantization.units import Unit
from onnxopt.targets import Placement

__all__ = ["Plan", "is_symmetric", "params_of_tensors"]


@dataclass(frozen=True)
class Plan:
    """A choice of units and tensors to quantize.

    nodes: the sites of units that become integer kernels. tensors: names of the activations that are
    quantized: what such units read, and what they write where the target wants that. params: of every
    tensor that could be. weight: the format of weights. per_channel: one scale for each output channel.
    saturates: whether it is for processors whose sums of two products leave 16 bits; weights are then scaled
    so that none does. rounded: site -> the weight's integers and their scales, where they are not simply the
    nearest ones. biases: site -> the bias, float32, where it is not the layer's own.
    """

    nodes: frozenset[str]
    tensors: frozenset[str]
    params: Mapping[str, QuantParams]
    weight: Format
    per_channel: bool = True
    power_of_two: bool = False
    saturates: bool = False
    rounded: Mapping[str, tuple[np.ndarray, QuantParams]] = field(default_factory=dict)
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)


def is_symmetric(placement: Placement, form: Format, low: float) -> bool:
    """Whether a tensor's zero is in the middle of its integers: not of unsigned ones, if none is negative."""
    return placement.symmetric and (form.signed or low < 0)


def params_of_tensors(
    units: Iterable[Unit],
    ranges: Mapping[str, tuple[float, float]],
    placement: Placement,
    *,
    activation: str | None = None,
    power_of_two: bool = False,
) -> dict[str, QuantParams]:
    """Scale and zero point of each tensor that the units read or write.

    What an operator that only moves numbers writes has the scale of what it reads, as its integer kernel
    does not change them. Softmax, Sigmoid and HardSigmoid have the range 0 to 1, whatever was seen.
    """
    form = find_format(activation or placement.activation)
    found: dict[str, QuantParams] = {}

    def params_of(name: str, low: float, high: float) -> None:
        if name not in found:
            symmetric = is_symmetric(placement, form, low)
            found[name] = params_from_range(low, high, form, symmetric=symmetric, power_of_two=power_of_two)

    for unit in units:
        for value in unit.sources:
            params_of(value.name or "", *ranges[value.name or ""])
        name = unit.output.name or ""
        if unit.is_move:
            found.setdefault(name, found[unit.sources[0].name or ""])
        elif unit.node.op_type in ("HardSigmoid", "Sigmoid", "Softmax"):
            params_of(name, 0.0, 1.0)
        else:
            params_of(name, *ranges[name])
    return found
