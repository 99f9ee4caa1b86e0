"""Plans as files: what a search chose and why, and with which ranges; to read, to edit, and to use again.

    {
      "schema": "onnxopt.plan/1",
      "model": "3f0c…",
      "keepers": ["round-weights"],
      "nodes": [{"site": "conv1", "op_type": "Conv", "as": "int8", "output": "uint8",
                 "weight_db": 41.0, "output_db": 38.2}],
      "ranges": {"x": [-2.1, 2.6]}
    }

`as` is the type of a node's weight, or "float"; `output` what it writes, which kernels of Gemm and MatMul may
choose. Nodes stand in the order of what they cost in accuracy; those that are not listed stay in float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.quantization.choose import chosen_tensors
from onnxopt.quantization.formats import QuantParams
from onnxopt.quantization.keepers import KEEPERS
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.units import Unit
from onnxopt.targets import Placement

__all__ = ["PLAN_SCHEMA", "GivenPlan", "PlanSource", "range_of", "read_plan"]

PLAN_SCHEMA = "onnxopt.plan/1"
_FLOAT = "float"

PlanSource = str | os.PathLike[str] | Mapping[str, Any]
"""A file, or what is in one."""


@dataclass(frozen=True)
class GivenPlan:
    """A plan as it was read.

    name: of the file. model: SHA-256 of the model it is for. keepers: in the order in which they apply.
    weights: site -> type of the weight, or float. outputs: sites whose outputs are quantized. ranges: name of
    a tensor -> its least and largest element.
    """

    name: str
    model: str
    keepers: tuple[str, ...]
    weights: Mapping[str, str]
    outputs: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]

    def require(self, model: str) -> None:
        """Raise UsageError unless it is for the model of that SHA-256."""
        if self.model != model:
            raise UsageError(
                f"{self.name}: the plan is for another model ({self.model[:12]}, this one is {model[:12]}); "
                "write one for this model with --save-plan"
            )

    def applied(
        self, plan: Plan, units: Sequence[Unit], placement: Placement, kept: Container[str] = ()
    ) -> Plan:
        """`plan` with the units and tensors that this one names.

        Args:
            plan: with the ranges of this one.
            units: of the model, whether their ranges are known or not.
            placement: what the target takes.
            kept: sites that stay in floating point all the same.

        Raises UsageError for a site, type or range that does not fit.
        """
        known = {unit.site: unit for unit in units}
        for site, kind in self.weights.items():
            if site not in known:
                raise UsageError(
                    f"{self.name}: there is no node {site!r} to quantize{did_you_mean(site, known)}"
                )
            if kind not in (_FLOAT, plan.weight.name):
                raise UsageError(
                    f"{self.name}: node {site!r} as {kind!r}: expected {plan.weight.name} or float"
                )
        nodes = frozenset(site for site, kind in self.weights.items() if kind != _FLOAT and site not in kept)
        written = {known[site].output.name or "" for site in self.outputs}
        tensors = chosen_tensors(units, nodes, written, outputs=placement.outputs)
        for name in tensors:
            if name not in plan.params:
                raise UsageError(f"{self.name}: there is no range for tensor {name!r}")
        return replace(plan, nodes=nodes, tensors=tensors)


def range_of(params: QuantParams) -> tuple[float, float]:
    """The least and largest number of a tensor's parameters; they give the same parameters again."""
    ends = np.array([params.format.low, params.format.high])
    zero, scale = float(params.zero_point), float(params.scale)
    low, high = (ends - zero) * scale
    return float(low), float(high)


def read_plan(source: PlanSource) -> GivenPlan:
    """A plan from a file, or from what is in one. Raises UsageError where it is none."""
    if isinstance(source, Mapping):
        return _read("plan", source)
    name = os.fspath(source)
    try:
        held = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name}: the plan cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{name}: the plan is not JSON: {error}") from None
    return _read(name, held)


def _read(name: str, held: Any) -> GivenPlan:
    if not isinstance(held, Mapping) or held.get("schema") != PLAN_SCHEMA:
        raise UsageError(f'{name}: not a plan: expected an object with "schema": "{PLAN_SCHEMA}"')
    try:
        weights = {str(node["site"]): str(node["as"]) for node in held["nodes"]}
        outputs = frozenset(str(n["site"]) for n in held["nodes"] if n.get("output", _FLOAT) != _FLOAT)
        ranges = {str(tensor): (float(low), float(high)) for tensor, (low, high) in held["ranges"].items()}
        found = GivenPlan(
            name, str(held["model"]), tuple(map(str, held["keepers"])), weights, outputs, ranges
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: not a plan of {PLAN_SCHEMA}: {type(error).__name__}: {error}") from None
    for keeper in found.keepers:
        if keeper not in KEEPERS:
            raise UsageError(f"{name}: unknown keeper {keeper!r}{did_you_mean(keeper, KEEPERS)}")
    for tensor, (low, high) in ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise UsageError(f"{name}: the range of tensor {tensor!r} is [{low}, {high}]")
    return found
