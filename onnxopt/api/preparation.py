"""From a scheme and a target to what is run: settings, what goes before, and passes that need no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import onnx_ir as ir

from onnxopt.api.finishing import cleaned
from onnxopt.errors import UsageError
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.keep import veto_of
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Settings
from onnxopt.recipe import build_pipeline, parse_pass
from onnxopt.targets import PLACEMENTS, Target

__all__ = ["prepare", "rewritten", "settings_for"]


def settings_for(
    scheme: Scheme, target: Target, activation: str | None, symmetric: bool, **options: Any
) -> Settings | None:
    """How to quantize for a target; None where the scheme is not static. Raises UsageError."""
    if not scheme.static:
        return None
    placement = PLACEMENTS[target.placement]
    usual = find_format(scheme.activation or placement.activation)
    form = find_format(activation) if activation is not None else usual
    if form.is_float != usual.is_float or form.bits < 8:
        kind = "8-bit floats" if usual.is_float else "integers of 8 or 16 bits"
        raise UsageError(f"scheme {scheme.name} takes activations in {kind}, not {form.name}")
    fast = form.bits == 8 and not form.is_float
    placement = replace(placement, symmetric=placement.symmetric or symmetric, bias=placement.bias and fast)
    options["saturates"] = options["saturates"] and fast
    timed = fast and target.placement == "x86"
    return Settings(placement, activation=form.name, weight=scheme.weight, timed=timed, **options)


def prepare(scheme: Scheme, settings: Settings | None, target: Target, freeze: bool) -> Pipeline:
    """What makes the graph ready: folded, merged, and of an opset that has the scheme's operators.

    ONNX Runtime fuses no activation behind an integer kernel: each part of it would read for itself.
    """
    pipeline = build_pipeline("quantize", freeze_initializers=freeze)
    form = find_format(settings.activation) if settings is not None and settings.activation else None
    version = max(scheme.opset, form.opset if form is not None else 0)
    more = ["fuse-activation{contrib=true}"] if target.contrib else []
    more.append(f"retarget-opset{{version={version}}}")
    return replace(pipeline, passes=(*pipeline.passes, *map(parse_pass, more)))


def rewritten(
    model: ir.Model, scheme: Scheme, options: Mapping[str, bool], kept: Collection[str]
) -> tuple[ir.Model | None, dict[str, tuple[str, ...]]]:
    """The model after the scheme's passes, None where they changed nothing; and reason -> sites left for it.

    Each pass takes those of the options that it has. kept: sites that stay in floating point.
    """
    passes: list[ir.passes.PassBase] = []
    for one in map(parse_pass, scheme.passes):
        assert is_dataclass(one)  # all that ship are
        known = {field.name for field in fields(one)}
        passes.append(replace(one, **{name: value for name, value in options.items() if name in known}))
    outcome = Pipeline(tuple(passes), rounds=1).run(lambda: model, veto=veto_of(kept))
    left = {reason: sites for step in outcome.steps for reason, sites in step.declined.items()}
    return (cleaned(outcome.model, "") if outcome.changes else None), left
