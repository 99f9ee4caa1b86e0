"""onnxopt: an ONNX graph optimizer that proves its numbers and measures its speed.

import onnxopt
result = onnxopt.optimize("model.onnx", target="cpu")
print(result.report.verdict.summary)
result.save("model.opt.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxopt.api import Package, optimize, pack, prune, quantize, unpack
    from onnxopt.benchmarking import Timing, bench
    from onnxopt.claims import Pass
    from onnxopt.diagnosis import diagnose
    from onnxopt.errors import (
        ModelError,
        OnnxoptError,
        ProviderError,
        RuntimeMissingError,
        UsageError,
    )
    from onnxopt.inspection import Finding, Inspection, inspect, lint
    from onnxopt.model import load
    from onnxopt.pipeline import Pipeline
    from onnxopt.recipe import load_recipe, parse_pass
    from onnxopt.reporting import Report
    from onnxopt.result import Result
    from onnxopt.rewrite import Declined, Edit, Rule
    from onnxopt.scope import Scope
    from onnxopt.storage import save
    from onnxopt.verification import Verdict, verify

__version__ = "0.1.0"

_HOMES = {
    "Declined": "rewrite",
    "Edit": "rewrite",
    "Finding": "inspection",
    "Inspection": "inspection",
    "ModelError": "errors",
    "OnnxoptError": "errors",
    "Package": "api",
    "Pass": "claims",
    "Pipeline": "pipeline",
    "ProviderError": "errors",
    "Report": "reporting",
    "Result": "result",
    "Rule": "rewrite",
    "RuntimeMissingError": "errors",
    "Scope": "scope",
    "Timing": "benchmarking",
    "UsageError": "errors",
    "Verdict": "verification",
    "bench": "benchmarking",
    "diagnose": "diagnosis",
    "inspect": "inspection",
    "lint": "inspection",
    "load": "model",
    "load_recipe": "recipe",
    "optimize": "api",
    "pack": "api",
    "parse_pass": "recipe",
    "prune": "api",
    "quantize": "api",
    "save": "storage",
    "unpack": "api",
    "verify": "verification",
}

__all__ = [
    "Declined",
    "Edit",
    "Finding",
    "Inspection",
    "ModelError",
    "OnnxoptError",
    "Package",
    "Pass",
    "Pipeline",
    "ProviderError",
    "Report",
    "Result",
    "Rule",
    "RuntimeMissingError",
    "Scope",
    "Timing",
    "UsageError",
    "Verdict",
    "__version__",
    "bench",
    "diagnose",
    "inspect",
    "lint",
    "load",
    "load_recipe",
    "optimize",
    "pack",
    "parse_pass",
    "prune",
    "quantize",
    "save",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used, so that `import onnxopt` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxopt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onnxopt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
