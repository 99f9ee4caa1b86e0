"""From a scheme and a target to what is run: settings, what goes before, and passes that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import onnx_ir as ir

from onnxopt.api.common import samples_for
from onnxopt.calibration import METHODS, spread
from onnxopt.data import Feeds, FeedSource
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.job import Job
from onnxopt.pipeline import Outcome, Pipeline
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Settings
from onnxopt.recipe import build_pipeline, parse_pass
from onnxopt.targets import PLACEMENTS, Target

__all__ = [
    "passes_of",
    "prepare",
    "prepared",
    "require_opset",
    "require_use",
    "samples_of",
    "settings_for",
]

_FEW = 8
"""Samples that are too few to be silent about."""
_PROVED = 32
"""Samples on which the preparation is proved, unless they show nothing."""
_BY_AXIS = 13
"""The opset of QuantizeLinear by axis."""
_STATIC = {
    "activation": (None, "--activation"),
    "symmetric": (False, "--symmetric"),
    "method": ("auto", "--calibration"),
    "sensitivity": (False, "a list of what nodes cost"),
    "cache": (None, "--cache"),
    "workers": (1, "--workers"),
    "executor": ("process", "--executor"),
    "plan": (None, "--plan"),
}
"""What only schemes that calibrate have a use for: its default, and what it is called."""
_OPTIONS = {"per_channel": (True, "--per-tensor"), "power_of_two": (False, "--power-of-two")}
"""What other schemes have a use for where their first pass, which they are about, has that option."""


def require_use(scheme: Scheme, asked: Mapping[str, Any]) -> None:
    """Raise UsageError where something is asked for that a scheme has no use for."""
    if scheme.static:
        return
    unused = [name for key, (default, name) in _STATIC.items() if asked[key] != default]
    main = parse_pass(scheme.passes[0])
    unused += [
        name for key, (usual, name) in _OPTIONS.items() if asked[key] != usual and not hasattr(main, key)
    ]
    if unused:
        raise UsageError(f"scheme {scheme.name} has no use for {unused[0]}: leave it out")


def require_opset(outcome: Outcome, settings: Settings) -> None:
    """Raise UsageError where the prepared model's opset is too old for what is to be written."""
    have, needed = outcome.model.graph.opset_imports.get("", 0), _least_opset(settings)
    if have >= needed:
        return
    declined = (reason for step in outcome.steps if step.name == "retarget-opset" for reason in step.declined)
    why = next(declined, "nothing can be proved of this model")
    raise UsageError(
        f"quantize: the model is of opset {have}, {needed} is needed, but it was not raised: {why}"
    )


def _least_opset(settings: Settings) -> int:
    names = (settings.activation, settings.weight)
    return max([_BY_AXIS, *(find_format(name).opset for name in names if name is not None)])


def settings_for(
    scheme: Scheme, target: Target, *, activation: str | None, symmetric: bool, method: str, **options: Any
) -> Settings | None:
    """How to quantize for a target; None where the scheme is not static. Raises UsageError."""
    if not scheme.static:
        return None
    if method not in METHODS:
        raise UsageError(f"unknown calibration method {method!r}{did_you_mean(method, METHODS)}")
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
    return Settings(
        placement, activation=form.name, weight=scheme.weight, method=method, timed=timed, **options
    )


def prepare(scheme: Scheme, settings: Settings | None, target: Target, freeze: bool) -> Pipeline:
    """What makes the graph ready: folded, merged, and of an opset that has the scheme's operators.

    ONNX Runtime fuses no activation behind an integer kernel: each part of it would read for itself.
    """
    pipeline = build_pipeline("quantize", freeze_initializers=freeze)
    version = max(scheme.opset, _least_opset(settings) if settings is not None else 0)
    more = ["fuse-activation{contrib=true}"] if target.contrib else []
    more.append(f"retarget-opset{{version={version}}}")
    return replace(pipeline, passes=(*pipeline.passes, *map(parse_pass, more)))


def passes_of(spelled: Sequence[str], options: Mapping[str, bool]) -> tuple[ir.passes.PassBase, ...]:
    """Passes as a recipe spells them; each takes those of the options that it has."""
    passes: list[ir.passes.PassBase] = []
    for one in map(parse_pass, spelled):
        assert is_dataclass(one)  # all that ship are
        known = {field.name for field in fields(one)}
        passes.append(replace(one, **{name: value for name, value in options.items() if name in known}))
    return tuple(passes)


def samples_of(job: Job, data: FeedSource | None, who: str) -> Sequence[Feeds]:
    """The user's samples, or made-up ones, with notes on what they are worth. Raises UsageError: none."""
    samples = samples_for(job, data)
    if not len(samples):
        raise UsageError(f"{who}: no samples could be made up for this model: give some with --data")
    if data is None:
        job.notes.append(
            "no --data: what is fitted or judged is so on made-up samples, which say little of real ones; "
            "a few dozen real samples are worth more than any setting"
        )
    elif len(samples) == 1:
        job.notes.append(
            "one sample alone: what it is judged by is what it was fitted to; 32 to 256 are usual"
        )
    elif len(samples) < _FEW:
        job.notes.append(
            f"only {len(samples)} samples, which may not show all that real ones hold; 32 to 256 are usual"
        )
    return samples


def prepared(job: Job, held_out: Sequence[Feeds]) -> Outcome:
    """The model made ready, under proof: on samples from all over, on all where those show nothing."""
    said = len(job.notes)
    outcome = job.run_under_proof(spread(held_out, _PROVED), None)
    if job.baseline is not None and job.baseline.unprovable and len(held_out) > _PROVED:
        del job.notes[said:]
        outcome = job.run_under_proof(held_out, None)
    return outcome
