"""Static quantization: calibrate once, keep what helps, measure what each tensor costs, search."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnxopt.calibration import Statistics, calibrate, choose_range, exposable
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_of, sizes_of
from onnxopt.quantization.choose import Prices, prices_of_bytes, prices_of_time
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.improve import improve
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.keepers import KEEPERS
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.planfile import GivenPlan
from onnxopt.quantization.search import Searched, judge_plan, search
from onnxopt.quantization.sensitivity import Source, measure_sensitivity
from onnxopt.quantization.shapes import measure_shapes
from onnxopt.quantization.units import Survey, Unit, survey
from onnxopt.targets import Placement

__all__ = ["Goal", "Settings", "Static", "quantize_static"]

Goal = Literal["speed", "size"]
Progress = Callable[[str, float | None], None]

_SENSITIVITY_SAMPLES = 6
"""Samples that each source is tried on; noise is a mean over all elements of the outputs: few do."""


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    placement: what the target takes. activation, weight: formats; the placement's own by default. method: of
    `calibration.METHODS`. keep: patterns of sites or operators that stay in floating point. goal: the least
    time, or the fewest bytes. saturates: whether sums may leave 16 bits on the CPU it is for. timed: whether
    the table of kernel costs is about the target. sensitivity: noise is measured even where the search needs
    none.
    """

    placement: Placement
    activation: str | None = None
    weight: str | None = None
    method: str = "auto"
    per_channel: bool = True
    power_of_two: bool = False
    keep: tuple[str, ...] = ()
    goal: Goal = "speed"
    saturates: bool = False
    timed: bool = True
    sensitivity: bool = False
    cache: Path | None = None
    workers: int = 1
    executor: Literal["process", "ray"] = "process"


@dataclass(frozen=True)
class Static:
    """What came of it.

    model: in floating point, as the keepers left it. surveyed: what could be quantized, and why the rest
    could not. noise: of each source alone; empty where the plan was given. keepers: name -> noise before and
    after, for those kept. kept: site -> why it had to stay in floating point.
    """

    model: ir.Model
    surveyed: Survey
    plan: Plan
    keepers: Mapping[str, tuple[float, float]]
    kept: Mapping[str, str]
    searched: Searched

    @property
    def chosen(self) -> Plan:
        """The plan of the best candidate, or of the nearest; without any unit where there is none."""
        candidate = self.searched.best or self.searched.nearest
        return self.plan if candidate is None else candidate.plan


def quantize_static(
    model: ir.Model,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    settings: Settings,
    judge: Judge,
    progress: Progress,
    given: GivenPlan | None = None,
) -> Static | Survey:
    """Quantize a prepared model; its survey alone where there is nothing to quantize.

    Args:
        model: in floating point, opset 13 or later; not changed.
        samples: to calibrate and to measure noise on. held_out: to choose ranges and keepers by.
        settings: how.
        judge: says whether a candidate keeps the budget.
        progress: called with what is being done.
        given: a plan, whose ranges and choice of nodes are taken; None: they are found.

    Raises UsageError where the plan, or what is to be kept in floating point, does not fit the model.
    """
    placement = settings.placement
    possible = survey(model, placement, frozenset(exposable(model)))
    if not possible.units:
        return possible
    narrow = dict.fromkeys(_narrow(possible.units, placement), "it is too narrow for the target's kernels")
    kept = narrow | dict.fromkeys(_matching(possible.units, settings.keep), "it was asked for")
    if given is not None:
        return _as_given(model, samples, settings, judge, progress, possible, kept, given)
    statistics = _calibrated(model, samples, held_out, settings, possible, progress)
    names = tensors_of(possible.units)
    known = [name for name in names if statistics[name].count and not statistics[name].nonfinite]
    surveyed = survey(model, placement, frozenset(known))
    if not surveyed.units:
        return surveyed
    plan = plan_of(surveyed.units, _ranges(surveyed.units, statistics, settings), settings)
    progress("keeping accuracy", None)
    draft, keepers = improve(Draft(model, placement, plan, statistics, settings.method), samples, held_out)
    model, plan = draft.model, draft.plan
    surveyed = survey(model, placement, plan.params)

    def measure() -> Mapping[Source, float]:
        some = [*samples[:_SENSITIVITY_SAMPLES]]
        told = partial(progress, "measuring sensitivity")
        return measure_sensitivity(model, placement, plan, some, progress=told)

    searched = search(
        model,
        surveyed.units,
        placement,
        plan,
        measure,
        _prices(model, samples[0], settings),
        judge,
        kept=kept,
        progress=lambda what: progress(what, None),
    )
    if settings.sensitivity and not searched.noise:
        searched = replace(searched, noise=measure())
    return Static(model, surveyed, plan, keepers, kept, searched)


def _calibrated(
    model: ir.Model,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    settings: Settings,
    possible: Survey,
    progress: Progress,
) -> Statistics:
    layers = [unit for unit in possible.units if unit.node.op_type in ("Conv", "Gemm")]
    return calibrate(
        model,
        samples,
        tensors_of(possible.units),
        held_out=held_out,
        channels={unit.sources[0].name or "": 1 for unit in layers},
        cache=settings.cache,
        workers=settings.workers,
        executor=settings.executor,
        progress=progress,
    )


def _as_given(
    model: ir.Model,
    samples: Sequence[Feeds],
    settings: Settings,
    judge: Judge,
    progress: Progress,
    possible: Survey,
    kept: Mapping[str, str],
    given: GivenPlan,
) -> Static:
    """The one candidate of a plan. The ranges in it are those behind the keepers, which are applied again."""
    placement = settings.placement
    known = survey(model, placement, given.ranges).units
    plan = plan_of(known, given.ranges, settings)
    plan = given.applied(plan, possible.units, placement.outputs, kept)
    progress("keeping accuracy", None)
    draft = Draft(model, placement, plan, Statistics({}), settings.method)
    for name in given.keepers:
        draft = KEEPERS[name](draft, samples) or draft
    progress("trying the plan", None)
    surveyed = survey(draft.model, placement, plan.params)
    searched = judge_plan(draft.model, surveyed.units, placement, draft.plan, judge)
    keepers = dict.fromkeys(given.keepers, (math.nan, math.nan))
    return Static(draft.model, surveyed, draft.plan, keepers, kept, searched)


def _prices(model: ir.Model, sample: Feeds, settings: Settings) -> Prices:
    if settings.goal == "size" or not settings.timed:
        return prices_of_bytes()
    shapes = measure_shapes(model, sample)

    def sizes(value: ir.Value) -> tuple[int, ...]:
        tensor = constant_of(value)
        return shapes.get(value.name or "", ()) if tensor is None else sizes_of(tensor)

    return prices_of_time(sizes)


def tensors_of(units: Sequence[Unit]) -> list[str]:
    """The names of the activations that units read and write."""
    values = dict.fromkeys(
        v for unit in units for v in (*unit.sources, unit.output) if constant_of(v) is None
    )
    return [value.name or "" for value in values]


def _ranges(
    units: Sequence[Unit], statistics: Statistics, settings: Settings
) -> dict[str, tuple[float, float]]:
    """Of each tensor that units read or write, by what calibration saw."""
    form = find_format(settings.activation or settings.placement.activation)
    how = {"symmetric": settings.placement.symmetric, "power_of_two": settings.power_of_two}
    chosen = (
        (name, choose_range(statistics[name], settings.method, form, **how)) for name in tensors_of(units)
    )
    return {name: (found.low, found.high) for name, found in chosen}


def plan_of(units: Sequence[Unit], ranges: Mapping[str, tuple[float, float]], settings: Settings) -> Plan:
    """How tensors and weights are quantized; no unit is chosen yet."""
    placement = settings.placement
    params = params_of_tensors(
        units, ranges, placement, activation=settings.activation, power_of_two=settings.power_of_two
    )
    return Plan(
        frozenset(),
        frozenset(),
        params,
        find_format(settings.weight or placement.weight),
        per_channel=settings.per_channel,
        power_of_two=settings.power_of_two,
        saturates=settings.saturates,
    )


def _matching(units: Sequence[Unit], patterns: Sequence[str]) -> list[str]:
    """The sites that patterns name, by site, node name or operator; UsageError where one names none."""
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [
            unit.site
            for unit in units
            if any(
                text == pattern or fnmatch.fnmatchcase(text or "", pattern)
                for text in (unit.site, unit.node.name, unit.node.op_type)
            )
        ]
        if not hits:
            raise UsageError(f"--keep {pattern!r}: no node that could be quantized has that name or operator")
        found.update(dict.fromkeys(hits))
    return list(found)


def _narrow(units: Sequence[Unit], placement: Placement) -> list[str]:
    """Layers with too few channels for the target's integer kernels."""
    found = []
    for unit in units:
        tensor = (
            constant_of(unit.node.inputs[unit.weight]) if unit.is_layer and unit.weight is not None else None
        )
        if tensor is not None and min(sizes_of(tensor)[:2]) < placement.narrow:
            found.append(unit.site)
    return found
