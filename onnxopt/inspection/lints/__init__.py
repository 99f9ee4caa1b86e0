"""Static checks of a model against what a target is known to refuse or to do badly; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.inspection.lints import cpu, tensorrt, tensorrt_quantization
from onnxopt.inspection.lints.sight import Finding, Rule, Sight
from onnxopt.model import ModelLike, load

__all__ = ["LINTS", "Finding", "Rule", "lint"]

LINTS: Mapping[str, tuple[Rule, ...]] = {
    "cpu": cpu.RULES,
    "tensorrt": tensorrt.RULES + tensorrt_quantization.RULES,
}
"""Target -> its rules, in the order in which they report."""


def lint(source: ModelLike, target: str) -> tuple[Finding, ...]:
    """Check a model against the rules of a target; subgraphs and functions included.

    A model without findings is not proven to run there: the rules are those that are known, each with its
    versions. Findings come rule by rule, and in the order of the graph.

    Raises:
        ModelError: not a usable model.
        UsageError: no rules are known for `target`.
    """
    if target not in LINTS:
        raise UsageError(f"no rules are known for the target {target!r}{did_you_mean(target, LINTS)}")
    seen = Sight(load(source))
    return tuple(finding for rule in LINTS[target] for finding in rule.findings(seen))
