"""The candidate of a `quantize`: by static quantization, and by passes that run behind it or alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from onnxopt.api.preparation import passes_of, require_opset
from onnxopt.api.work import Candidate, Work
from onnxopt.graph import tensor_bytes
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.finish import Finished, Finisher
from onnxopt.quantization.planfile import GivenPlan
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.static import Settings, Static, quantize_static
from onnxopt.quantization.units import Survey
from onnxopt.recipe import parse_pass

__all__ = ["TRIAL_S", "find_candidate"]

TRIAL_S = 4.0
"""Seconds to find out which of two candidates is faster."""


def find_candidate(work: Work, given: GivenPlan | None) -> Candidate:
    """The best candidate; `given` is a plan to take instead of a search. Raises UsageError: see there."""
    if work.settings is None:
        return _without_data(work)
    require_opset(work.prepared, work.settings)
    return _with_data(work, replace(work.settings, keep=work.kept), given)


def _with_data(work: Work, settings: Settings, given: GivenPlan | None) -> Candidate:
    """By static quantization, and on the CPU by quantization at run time, whichever is better."""
    plain, say = work.prepared.model, work.job.progress
    found = quantize_static(plain, work.fitted, work.held_out, settings, work.judge, say, given)
    made = _best_of(work, settings, found)
    left = _left_in_float(found, made.rewritten)
    if made.judgement is not None:
        return Candidate(made.model, made.judgement, found, made, left)
    nearest = found.searched.nearest if isinstance(found, Static) else None
    if nearest is None or nearest.judgement.ok:
        return Candidate(None, None, found, made, left)
    model = _cleaned(nearest.model, work.target.placement)
    return Candidate(model, nearest.judgement, found, made, left)


def _without_data(work: Work) -> Candidate:
    """What the passes of a scheme make of a float model."""
    passes, tidy = passes_of(work.scheme.passes, work.options), partial(_cleaned, placement="")
    finisher = Finisher(
        passes, tidy, work.kept, lambda _: {}, work.judge, lambda _before, _after: (True, "as asked")
    )
    made = finisher.finished(Finished(work.prepared.model, None, static=False))
    left = {reason: sites for one in made.tried for reason, sites in one.left.items()}
    judged = made.judgement is not None
    return Candidate(made.model if judged else None, made.judgement, None, made, left)


def _best_of(work: Work, settings: Settings, found: Static | Survey) -> Finished:
    """The best result of static quantization and, on the CPU, of quantization at run time.

    The float model, with no judgement, where neither has any.
    """
    best = found.searched.best if isinstance(found, Static) else None
    target = work.target
    plain = found.model if isinstance(found, Static) else work.prepared.model
    nothing = Finished(plain, None, static=False)
    static = None
    if best is not None:
        static = Finished(_cleaned(best.model, target.placement), best.judgement, static=True)
    if target.name != "cpu" or settings.power_of_two:  # scales that are found at run time are any
        return static or nothing
    tidy = partial(_cleaned, placement=target.placement)
    passes = passes_of(work.scheme.finishing, {"reduce_range": settings.saturates})
    noise = partial(_noise_of, found)
    pays = partial(_pays, work)
    return Finisher(passes, tidy, settings.keep, noise, work.judge, pays).best(nothing, static)


def _pays(work: Work, before: ir.Model, after: ir.Model) -> tuple[bool, str]:
    """Whether a model is smaller, or faster, than another; taken for granted where speed is not measured."""
    if work.goal == "size":
        sizes = tensor_bytes(before), tensor_bytes(after)
        return sizes[1] < sizes[0], "from {:,} to {:,} bytes".format(*sizes)
    timing = work.job.time(before, after, work.samples, {}, seconds=TRIAL_S) if work.measure else None
    if timing is None:
        return not work.measure, "speed not measured"
    return timing.verdict == "faster", timing.summary


def _cleaned(model: ir.Model, placement: str) -> ir.Model:
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


def _left_in_float(found: Static | Survey, done: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Reason -> the nodes that static quantization left, without those `done` since."""
    left = (found.surveyed if isinstance(found, Static) else found).left.items()
    rest = {reason: tuple(site for site in sites if site not in done) for reason, sites in left}
    return {reason: sites for reason, sites in rest.items() if sites}
