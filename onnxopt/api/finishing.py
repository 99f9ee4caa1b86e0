"""What `quantize` does behind static quantization: take float weights away, quantize the rest at run time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import onnx_ir as ir

from onnxopt.api.preparation import passes_of
from onnxopt.data import Feeds
from onnxopt.graph import tensor_bytes
from onnxopt.job import Job
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.finish import Finished, Finisher, Pays
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.static import Goal, Settings, Static
from onnxopt.quantization.units import Survey
from onnxopt.quantization.whole import idle_sites
from onnxopt.recipe import parse_pass
from onnxopt.targets import Target

__all__ = ["TRIAL_S", "best_of", "best_without_data", "cleaned", "comparison", "left_in_float", "nearest_of"]

TRIAL_S = 4.0
"""Seconds to find out which of two candidates is faster."""


def best_of(
    found: Static | Survey,
    plain: ir.Model,
    scheme: Scheme,
    target: Target,
    settings: Settings,
    judge: Judge,
    pays: Pays,
) -> Finished:
    """The best result of static quantization and, on the CPU, of quantization at run time.

    The float model, with no judgement, where neither has any.

    Args:
        found: of static quantization. plain: the prepared model in floating point; not changed.
        scheme, target, settings, judge: as of it. pays: whether one candidate is better than another.
    """
    best = found.searched.best if isinstance(found, Static) else None
    placement = target.placement
    nothing = Finished(found.model if isinstance(found, Static) else plain, None, static=False)
    static = (
        Finished(cleaned(best.model, placement), best.judgement, static=True) if best is not None else None
    )
    if target.name != "cpu" or settings.power_of_two:  # scales that are found at run time are any
        return static or nothing
    tidy = partial(cleaned, placement=placement)
    passes = passes_of(scheme.finishing, {"reduce_range": settings.saturates})
    kept = settings.keep | idle_sites(found)
    return Finisher(passes, tidy, kept, partial(_noise_of, found), judge, pays).best(nothing, static)


def best_without_data(
    plain: ir.Model, scheme: Scheme, options: Mapping[str, bool], kept: frozenset[str], judge: Judge
) -> tuple[Finished, dict[str, tuple[str, ...]]]:
    """What the passes of a scheme make of a float model, and reason -> nodes that they leave as they were.

    Args:
        plain: not changed. options: each pass takes those that it has. kept: sites that stay in float.
    """
    passes, tidy = passes_of(scheme.passes, options), partial(cleaned, placement="")
    finisher = Finisher(passes, tidy, kept, lambda _: {}, judge, lambda _before, _after: (True, "as asked"))
    made = finisher.finished(Finished(plain, None, static=False))
    return made, {reason: sites for one in made.tried for reason, sites in one.left.items()}


def nearest_of(found: Static | Survey, target: Target) -> tuple[ir.Model | None, Judgement | None]:
    """The candidate that is nearest to the budget where none keeps it."""
    nearest = found.searched.nearest if isinstance(found, Static) else None
    if nearest is None or nearest.judgement.ok:
        return None, None
    return cleaned(nearest.model, target.placement), nearest.judgement


def cleaned(model: ir.Model, placement: str) -> ir.Model:
    """Without the float weights that nobody reads any more."""
    merging = ("merge-qdq",) if placement in ("x86", "arm") else ()
    passes = (*merging, "eliminate-dead", "dedupe-initializers")
    return Pipeline(tuple(map(parse_pass, passes))).run(lambda: model).model


def _noise_of(found: Static | Survey, sites: Collection[str]) -> dict[str, float]:
    """Site -> the noise of its operands in fixed ranges, of these sites."""
    if not isinstance(found, Static):
        return {}
    operands = {
        unit.site: [
            Source("weight", unit.site),
            *(Source("tensor", value.name or "") for value in unit.sources),
        ]
        for unit in found.surveyed.units
        if unit.site in sites
    }
    noise = found.noise(frozenset(source for of in operands.values() for source in of))
    return {site: sum(noise.get(source, 0.0) for source in of) for site, of in operands.items()}


def left_in_float(found: Static | Survey | None, done: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Reason -> the nodes that static quantization left, without those `done` since."""
    surveyed = found.surveyed if isinstance(found, Static) else found
    left = surveyed.left.items() if surveyed is not None else ()
    rest = {reason: tuple(site for site in sites if site not in done) for reason, sites in left}
    return {reason: sites for reason, sites in rest.items() if sites}


def comparison(job: Job, goal: Goal, samples: Sequence[Feeds], *, measure: bool) -> Pays:
    """Whether a model is smaller, or faster, than another; taken for granted where speed is not measured."""

    def pays(before: ir.Model, after: ir.Model) -> tuple[bool, str]:
        if goal == "size":
            sizes = tensor_bytes(before), tensor_bytes(after)
            return sizes[1] < sizes[0], "from {:,} to {:,} bytes".format(*sizes)
        timing = job.time(before, after, samples, {}, seconds=TRIAL_S) if measure else None
        if timing is None:
            return not measure, "speed not measured"
        return timing.verdict == "faster", timing.summary

    return pays
