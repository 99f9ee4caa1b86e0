"""What the options of `quantize` mean for a scheme and a target; those that have no use there are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from onnxopt.calibration import METHODS
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Goal, Settings
from onnxopt.targets import PLACEMENTS, Placement, Target

__all__ = ["least_opset", "passes_for", "static_settings"]

_ACTIVATIONS = ("uint8", "int8", "uint16", "int16")
_BY_AXIS = 13
"""The opset of QuantizeLinear by axis."""
_STATIC_ONLY = {
    "activation": (None, "--activation"),
    "method": ("auto", "--calibration"),
    "keep": ((), "--keep"),
    "sensitivity": (False, "the sensitivity of nodes"),
    "cache": (None, "--cache"),
    "workers": (1, "--workers"),
    "executor": ("process", "--executor"),
}
"""What only schemes that calibrate have: the default, and what it is called."""


def static_settings(
    scheme: Scheme, target: Target, goal: Goal, isas: Sequence[str], asked: Mapping[str, Any]
) -> Settings:
    """The settings of a scheme that calibrates; `asked`: fields of `Settings`. Raises UsageError."""
    if asked["method"] not in METHODS:
        hint = did_you_mean(asked["method"], METHODS)
        raise UsageError(f"unknown calibration method {asked['method']!r}{hint}")
    placement = _placement(scheme, target)
    settings = Settings(
        placement,
        weight=scheme.weight,
        goal=goal,
        saturates=bool(isas),
        timed=target.name in ("cpu", "generic"),
        **asked,
    )
    return replace(settings, activation=_activation(scheme, target, placement, asked["activation"]))


def passes_for(
    scheme: Scheme, isas: Sequence[str], asked: Mapping[str, Any], plan: object
) -> tuple[ir.passes.PassBase, ...]:
    """The passes of a scheme that does not calibrate, with their options. Raises UsageError."""
    given = [name for field, (default, name) in _STATIC_ONLY.items() if asked[field] != default]
    if plan is not None:
        given.append("--plan")
    for name in given:
        raise UsageError(f"scheme {scheme.name} does not calibrate: {name} has no use there, leave it out")
    options = {
        option: asked[option]
        for option, default in (("per_channel", True), ("power_of_two", False))
        if asked[option] != default
    }
    return scheme.passes_with(options, {"reduce_range": True} if isas else {})


def least_opset(settings: Settings) -> int:
    """The first opset that has QuantizeLinear by axis, and of the formats."""
    names = (settings.activation, settings.weight)
    return max([_BY_AXIS, *(find_format(name).opset for name in names if name is not None)])


def _placement(scheme: Scheme, target: Target) -> Placement:
    if not target.placement:
        raise UsageError(
            f"scheme {scheme.name} is not offered for target {target.name}: its provider has no integer "
            "kernels for it; take float16, or weight-only int8 or int4"
        )
    return PLACEMENTS[target.placement]


def _activation(scheme: Scheme, target: Target, placement: Placement, asked: str | None) -> str | None:
    """The format of activations, None for the target's own."""
    if asked is None or asked == scheme.activation:
        return scheme.activation
    if scheme.activation is not None:
        raise UsageError(
            f"scheme {scheme.name} has {scheme.activation} activations: leave out --activation {asked}"
        )
    if asked not in _ACTIVATIONS:
        raise UsageError(f"--activation {asked}: expected one of {', '.join(_ACTIVATIONS)}")
    if placement.symmetric and not find_format(asked).signed:
        raise UsageError(f"--activation {asked}: target {target.name} takes signed activations only")
    return asked
