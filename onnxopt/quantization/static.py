"""Static quantization: calibrate once, choose roughly, keep what helps there, search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from onnxopt.calibration import Statistics, calibrate, choose_range, exposable
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, sizes_of
from onnxopt.quantization.choose import Prices, prices_of_bytes, prices_of_time, prices_of_work
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.improve import improve, improve_choice, unchanged
from onnxopt.quantization.judge import Judging
from onnxopt.quantization.keepers import FIRST, KEEPERS
from onnxopt.quantization.plan import Plan, is_symmetric, params_of_tensors
from onnxopt.quantization.planfile import GivenPlan
from onnxopt.quantization.search import Search, Searched, judge_plan
from onnxopt.quantization.sensitivity import Noise, Source, measure_sensitivity, sources_of
from onnxopt.quantization.shapes import measure_shapes
from onnxopt.quantization.units import Survey, Unit, survey
from onnxopt.targets import Placement

__all__ = [
    "Goal",
    "Settings",
    "Static",
    "calibrated",
    "plan_of",
    "quantize_static",
    "ranges_of",
    "tensors_of",
]

Goal = Literal["speed", "size"]
_AS_WRITTEN = MappingProxyType(
    {
        "session.disable_quant_qdq": "1",
        "optimization.disable_specified_optimizers": "ReluQuantRewrite;ClipQuantRewrite",
    }
)
"""Q and DQ as they stand. ONNX Runtime 1.31 makes QLinearConv of 8-bit floats, too, and refuses it then, and
it leaves out a Relu in front of a zero point 0 of 8-bit floats, as if those had no negative numbers."""

Progress = Callable[[str, float | None], None]

_SENSITIVITY_SAMPLES = 6
"""Samples that each source is tried on; noise is a mean over all elements of the outputs: few do."""


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    placement: what the target takes. activation, weight: formats; the placement's own by default. method: of
    `calibration.METHODS`. keep: sites that stay in floating point. goal: the least
    time, or the fewest bytes. saturates: whether sums may leave 16 bits on the CPU it is for. timed: whether
    the table of kernel costs is about what is quantized, and the runtime here has the target's kernels;
    otherwise integers are taken for all that the budget allows, and no fusion is proved. sensitivity: noise
    is measured even where the search needs none.
    """

    placement: Placement
    activation: str | None = None
    weight: str | None = None
    method: str = "auto"
    per_channel: bool = True
    power_of_two: bool = False
    keep: frozenset[str] = frozenset()
    goal: Goal = "speed"
    saturates: bool = False
    timed: bool = True
    sensitivity: bool = False
    cache: Path | None = None
    workers: int = 1
    executor: Literal["process", "ray"] = "process"

    @property
    def session_config(self) -> Mapping[str, str]:
        """How quantized models run here: as in the standard where the runtime lacks the target's kernels."""
        return {} if self.timed else _AS_WRITTEN


@dataclass(frozen=True)
class Static:
    """What came of it.

    model: in floating point, as the keepers left it. surveyed: what could be quantized, and why the rest
    could not. statistics: of calibration; none where a plan was given. noise: of each source alone, where it
    was measured. keepers: name -> noise before and after, for those kept. kept: sites that the user wants in
    floating point.
    """

    model: ir.Model
    surveyed: Survey
    statistics: Statistics
    plan: Plan
    noise: Noise
    keepers: Mapping[str, tuple[float, float]]
    kept: tuple[str, ...]
    searched: Searched


def quantize_static(
    model: ir.Model,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    settings: Settings,
    judge: Judging,
    progress: Progress,
    given: GivenPlan | None = None,
    statistics: Statistics | None = None,
) -> Static | Survey:
    """Quantize a prepared model; its survey alone where there is nothing to quantize.

    Args:
        model: in floating point, opset 13 or later; not changed.
        samples: to calibrate and to measure noise on. held_out: to choose ranges and keepers by.
        settings: how.
        judge: says whether a candidate keeps the budget.
        progress: called with what is being done.
        given: a plan, whose ranges and choice of nodes are taken; None: they are found.
        statistics: of the same calibration, where it was done before.

    Raises UsageError where the plan does not fit the model.
    """
    placement = settings.placement
    possible = survey(model, placement, frozenset(exposable(model)))
    if not possible.units:
        return possible
    if given is not None:
        return _as_given(model, samples, settings, judge, progress, possible, given)
    if statistics is None:
        statistics = calibrated(model, samples, held_out, settings, possible, progress)
    names = tensors_of(possible.units)
    known = [name for name in names if statistics[name].count and not statistics[name].nonfinite]
    surveyed = survey(model, placement, frozenset(known))
    if not surveyed.units:
        return surveyed
    plan = plan_of(surveyed.units, ranges_of(surveyed.units, statistics, settings), settings)
    draft = Draft(model, placement, plan, statistics, settings.method)
    prices = _prices(model, samples[0], settings)
    noise = _noise(draft, samples, {}, progress)
    search = _search(draft, noise, prices, settings, judge, progress)
    progress("keeping accuracy", None)
    config = settings.session_config
    improved, keepers = improve(draft, search.choices(), FIRST, samples, held_out, config)
    if keepers:
        same = unchanged(draft, improved)
        measured = {source: value for source, value in noise.known.items() if source in same}
        draft, noise = improved, _noise(improved, samples, measured, progress)
        search = _search(draft, noise, prices, settings, judge, progress)
    if settings.sensitivity:
        noise()
    last = partial(
        improve_choice, draft=draft, judge=judge, samples=samples, held_out=held_out, session_config=config
    )
    searched = search.run(proves=settings.timed, improve=last)
    if searched.best is not None:
        keepers = {**keepers, **searched.best.keepers}
    surveyed = survey(draft.model, placement, draft.plan.params)
    kept = _kept(surveyed.units, settings)
    return Static(draft.model, surveyed, statistics, draft.plan, noise, keepers, kept, searched)


def _noise(
    draft: Draft, samples: Sequence[Feeds], known: Mapping[Source, float], progress: Progress
) -> Noise:
    some, told = [*samples[:_SENSITIVITY_SAMPLES]], partial(progress, "measuring sensitivity")

    def measure(sources: Sequence[Source]) -> Mapping[Source, float]:
        wanted = frozenset(sources)
        return measure_sensitivity(draft.model, draft.placement, draft.plan, some, wanted, progress=told)

    return Noise(sources_of(draft.units()), measure, known)


def _search(
    draft: Draft, noise: Noise, prices: Prices, settings: Settings, judge: Judging, progress: Progress
) -> Search:
    units = draft.units()
    return Search(
        draft.model,
        units,
        draft.placement,
        draft.plan,
        noise,
        prices,
        judge,
        kept=_kept(units, settings),
        progress=lambda what: progress(what, None),
    )


def _kept(units: Sequence[Unit], settings: Settings) -> tuple[str, ...]:
    return tuple(unit.site for unit in units if unit.site in settings.keep)


def calibrated(
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
    judge: Judging,
    progress: Progress,
    possible: Survey,
    given: GivenPlan,
) -> Static:
    """The one candidate of a plan. The ranges in it are those behind the keepers, which are applied again."""
    placement = settings.placement
    known = survey(model, placement, given.ranges).units
    plan = given.applied(plan_of(known, given.ranges, settings), possible.units, placement, settings.keep)
    progress("keeping accuracy", None)
    draft = Draft(model, placement, plan, Statistics({}), settings.method)
    for name in given.keepers:
        draft = KEEPERS[name](draft, samples) or draft
    progress("trying the plan", None)
    model, plan = draft.model, draft.plan
    surveyed = survey(model, placement, plan.params)
    searched = judge_plan(model, surveyed.units, placement, plan, judge, proves=settings.timed)
    keepers = dict.fromkeys(given.keepers, (math.nan, math.nan))
    kept = _kept(surveyed.units, settings)
    return Static(model, surveyed, Statistics({}), plan, Noise(), keepers, kept, searched)


def _prices(model: ir.Model, sample: Feeds, settings: Settings) -> Prices:
    if settings.goal == "size":
        return prices_of_bytes()
    shapes = measure_shapes(model, sample)

    def sizes(value: ir.Value) -> tuple[int, ...]:
        tensor = constant_of(value)
        return shapes.get(value.name or "", ()) if tensor is None else sizes_of(tensor)

    return prices_of_time(sizes) if settings.timed else prices_of_work(sizes)


def tensors_of(units: Sequence[Unit]) -> list[str]:
    """The names of the activations that units read and write."""
    values = dict.fromkeys(
        v for unit in units for v in (*unit.sources, unit.output) if constant_of(v) is None
    )
    return [value.name or "" for value in values]


def ranges_of(
    units: Sequence[Unit], statistics: Statistics, settings: Settings
) -> dict[str, tuple[float, float]]:
    """Of each tensor that units read or write, by what calibration saw."""
    form = find_format(settings.activation or settings.placement.activation)
    ranges = {}
    for name in tensors_of(units):
        found = choose_range(
            statistics[name],
            settings.method,
            form,
            symmetric=is_symmetric(settings.placement, form, statistics[name].minimum),
            power_of_two=settings.power_of_two,
        )
        ranges[name] = (found.low, found.high)
    return ranges


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
