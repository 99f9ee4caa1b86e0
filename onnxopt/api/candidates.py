"""The candidate of a `quantize`: by static quantization, and by passes that run behind it or alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from onnxopt.api.preparation import passes_of, require_opset
from onnxopt.api.work import Candidate, Work
from onnxopt.calibration import Statistics
from onnxopt.graph import tensor_bytes
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.expected import TABLE, expect
from onnxopt.quantization.finish import Finished, Finisher
from onnxopt.quantization.planfile import GivenPlan
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.static import Settings, Static
from onnxopt.quantization.units import Survey
from onnxopt.quantization.whole import idle_sites, quantize_whole
from onnxopt.recipe import parse_pass

__all__ = ["TRIAL_S", "find_candidate"]

TRIAL_S = 4.0
"""Seconds to find out which of two candidates is faster."""


def find_candidate(work: Work, given: GivenPlan | None) -> Candidate:
    """The best candidate; where the budget has to be kept on other CPUs, too, one that keeps it there.

    Weights are scaled for the sums of those only where the candidate for the CPU here does not do.

    Args:
        work: what is asked for.
        given: a plan to take instead of a search.

    Raises UsageError where the model, prepared, cannot hold what is asked for, or the plan does not fit.
    """
    if not work.isas:
        return _candidate(work, given)
    plain = _candidate(_for_here(work), given)
    if plain.model is None or plain.judgement is None or not plain.judgement.ok:
        return plain
    where = " and ".join(work.isas)
    work.job.progress(f"judging on {where}", None)
    judgement = work.judge(plain.model)
    if judgement.ok:
        work.job.notes.append(f"the budget holds on {where}, too, with weights as they are best here")
        return replace(plain, judgement=judgement)
    work.job.notes.append(
        f"weights are scaled so that no sum saturates; as they are best here, {judgement.reason}"
    )
    return _candidate(work, given, plain.found)


def _for_here(work: Work) -> Work:
    """The same work for the CPU here alone."""
    settings = replace(work.settings, saturates=False) if work.settings is not None else None
    options = {**work.options, "reduce_range": False}
    return replace(work, settings=settings, options=options, judge=work.judge.here, isas=())


def _candidate(work: Work, given: GivenPlan | None, before: Static | Survey | None = None) -> Candidate:
    """`before`: what was found for other weights; it was calibrated as this is to be."""
    if work.settings is None:
        return _without_data(work)
    require_opset(work.prepared, work.settings)
    settings = replace(work.settings, keep=work.kept)
    statistics = before.statistics if isinstance(before, Static) else None
    return _with_data(work, settings, given, statistics)


def _with_data(
    work: Work, settings: Settings, given: GivenPlan | None, statistics: Statistics | None
) -> Candidate:
    """By static quantization, and on the CPU by quantization at run time, whichever is better."""
    plain, say = work.prepared.model, work.job.progress
    found = quantize_whole(plain, work.fitted, work.held_out, settings, work.judge, say, given, statistics)
    made = _best_of(work, settings, found)
    if made.tried and work.goal == "speed" and not work.measure:
        work.job.notes.append(f"speed not measured: {TABLE} decided what is quantized at run time")
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
    kept = settings.keep | idle_sites(found)
    noise = partial(_noise_of, found)
    pays = partial(_pays, work)
    return Finisher(passes, tidy, kept, noise, work.judge, pays).best(nothing, static)


def _pays(work: Work, before: ir.Model, after: ir.Model) -> tuple[bool, str]:
    """Whether a model is smaller, or faster, than another; by a table where speed is not measured."""
    if work.goal == "size":
        sizes = tensor_bytes(before), tensor_bytes(after)
        return sizes[1] < sizes[0], "from {:,} to {:,} bytes".format(*sizes)
    if not work.measure:
        return expect(before, after, work.samples[0])
    timing = work.job.time(before, after, work.samples, {}, seconds=TRIAL_S)
    if timing is None:
        return False, "speed not measured"
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
