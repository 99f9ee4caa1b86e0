"""What is said of a quantized model, too: what its target refuses, and where it saturates."""

from __future__ import annotations

import platform
from collections import Counter

import onnx_ir as ir

from onnxopt.emulation import find_isa
from onnxopt.errors import ProviderError, RuntimeMissingError
from onnxopt.inspection.lints import LINTS, Finding, lint
from onnxopt.model import ModelLike
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.saturation import find_saturation
from onnxopt.runtimes import RunError, UnsupportedModelError
from onnxopt.targets import Target

__all__ = ["lint_findings", "new_error", "not_here", "saturation_notes"]

_EMULATED_MACS = 5e9
"""Multiply-accumulates that are emulated without being asked for: some ten seconds."""


def not_here(target: Target) -> str:
    """Why what runs here says nothing of the target's kernels; empty where it does, or a provider tells."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    if target.placement != "arm" or arm:
        return ""
    return f"speed not measured and no fusion proved: this is no ARM processor but {platform.machine()}"


def lint_findings(model: ir.Model, target: Target) -> tuple[Finding, ...]:
    """What the rules of a target that has no CPU provider find in a result; none where there are no rules."""
    return lint(model, target.name) if target.name in LINTS and target.provider != "cpu" else ()


def new_error(found: tuple[Finding, ...], original: ModelLike, target: Target) -> str:
    """The first rule that a result breaks more often than the original, and how; empty if there is none."""
    errors = [one for one in found if one.severity == "error"]
    if not errors:
        return ""
    before = Counter(one.rule for one in lint(original, target.name))
    for one in errors:
        before[one.rule] -= 1
        if before[one.rule] < 0:
            return f"{target.name} refuses it, rule {one.rule}: {one.site}: {one.message}"
    return ""


def saturation_notes(
    model: ir.Model, judge: Judge, macs: int | str, samples: int, *, measure: bool
) -> list[str]:
    """How many layers can saturate on CPUs that have AVX2 and no VNNI, and for small models what that costs.

    Args:
        model: quantized, of U8 activations and S8 weights.
        judge: what to measure with on an emulated CPU.
        macs: of one run. samples: runs of the judge.
        measure: whether to emulate at all.
    """
    layers = find_saturation(model)
    if not layers:
        return []
    text = f"on CPUs without VNNI, sums of {len(layers)} layers can saturate; --also-isa avx2 avoids it"
    small = isinstance(macs, int) and macs * samples <= _EMULATED_MACS
    if not (measure and small and judge.by_outputs):
        return [f"{text}, onnxopt verify --isa avx2 tells what it costs"]
    try:
        find_isa("avx2")
        return [f"{text}; as it is, there: {judge.on(model, 'avx2').summary}"]
    except (ProviderError, RunError, RuntimeMissingError, UnsupportedModelError) as error:
        return [f"{text}; what it costs was not measured: {error}"]
