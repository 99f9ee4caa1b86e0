"""Static quantization of a main graph and of the branches in it, each as a model of its own.

A branch of an If is calibrated on the samples that run it, and searched like a model; its candidates are put
back and judged as part of the whole. The main graph follows, with the branches as they were chosen. Branches
in branches are treated alike. What no sample runs stays in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from onnxopt.calibration import Statistics
from onnxopt.data import Feeds
from onnxopt.graph import walk
from onnxopt.ledger import site_of
from onnxopt.quantization.branches import branches_of, put_back, samples_of, take_out
from onnxopt.quantization.judge import Judgement, Judging
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.planfile import GivenPlan
from onnxopt.quantization.search import Candidate, Searched
from onnxopt.quantization.sensitivity import Noise, Source, sources_of
from onnxopt.quantization.static import Progress, Settings, Static, quantize_static
from onnxopt.quantization.units import HEAVY, Survey

__all__ = ["idle_sites", "quantize_whole"]

_IDLE = "its branch runs on no sample of calibration, or on none that is held out"

PutBack = Callable[[ir.Model], ir.Model]


def quantize_whole(
    model: ir.Model,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    settings: Settings,
    judge: Judging,
    progress: Progress,
    given: GivenPlan | None = None,
    statistics: Statistics | None = None,
) -> Static | Survey:
    """Quantize a prepared model in which no two values have one name.

    Args, result and errors are those of `quantize_static`. Where branches were quantized, `model` of the
    result is as it was given, and a keeper has the noise of the last graph that it was kept in; what the main
    graph computes depends on them, so that statistics of before are not used.
    """
    whole, parts = model, list[Static | Survey]()
    inner: dict[str, None] = {}
    for branch in branches_of(model):
        nodes = list(walk(branch.body_in(model)))
        heavy = [node for node in nodes if node.op_type in HEAVY]
        if not heavy:
            continue
        sites = dict.fromkeys(map(site_of, nodes))
        inner |= sites
        with samples_of(model, branch, samples, held_out) as (fitted, held):
            if not fitted or not held:
                parts.append(_idle(heavy))
                continue
            progress(f"quantizing {branch.side} of {branch.owner!r}", None)
            back = partial(put_back, whole, branch)
            found = quantize_whole(
                take_out(model, branch, fitted[0]),
                fitted,
                held,
                settings,
                partial(_judged, judge, back),
                progress,
                given and _about(given, sites),
            )
        parts.append(_as_part(found, back))
        best = _best(parts[-1:])
        whole = best.model if best is not None else whole
    others = given and _about(given, [site for site in given.weights if site not in inner])
    known = None if inner else statistics
    main = quantize_static(whole, samples, held_out, settings, judge, progress, others, known)
    return _joined(model, [*parts, _without(main, inner)]) if inner else main


def idle_sites(found: Static | Survey) -> frozenset[str]:
    """The heavy nodes that no sample runs, so that nothing can be said of them."""
    left = found.left if isinstance(found, Survey) else found.surveyed.left
    return frozenset(site for reason, sites in left.items() if reason.endswith(_IDLE) for site in sites)


def _idle(nodes: Sequence[ir.Node]) -> Survey:
    kinds = dict.fromkeys(node.op_type for node in nodes)
    left = {f"{kind}: {_IDLE}": tuple(site_of(n) for n in nodes if n.op_type == kind) for kind in kinds}
    return Survey((), left)


def _judged(judge: Judging, back: PutBack, part: ir.Model) -> Judgement:
    return judge(back(part))


def _about(given: GivenPlan, sites: Collection[str]) -> GivenPlan:
    """What a plan has on some sites."""
    weights = {site: kind for site, kind in given.weights.items() if site in sites}
    return replace(given, weights=weights, outputs=given.outputs.intersection(sites))


def _as_part(found: Static | Survey, back: PutBack) -> Static | Survey:
    """What was found of a branch, with candidates that are whole models."""
    if isinstance(found, Survey):
        return found

    def lifted(one: Candidate | None) -> Candidate | None:
        return one and replace(one, model=back(one.model))

    searched = found.searched
    return replace(
        found, searched=replace(searched, best=lifted(searched.best), nearest=lifted(searched.nearest))
    )


def _without(found: Static | Survey, inner: Collection[str]) -> Static | Survey:
    """What was found of a main graph, without the nodes in branches that have been looked at."""
    surveyed = _surveyed(found)
    rest = {why: tuple(s for s in sites if s not in inner) for why, sites in surveyed.left.items()}
    own = Survey(surveyed.units, {why: sites for why, sites in rest.items() if sites})
    return own if isinstance(found, Survey) else replace(found, surveyed=own)


def _joined(model: ir.Model, parts: Sequence[Static | Survey]) -> Static | Survey:
    """What was found of a model, from its parts in the order in which they were quantized."""
    left: dict[str, tuple[str, ...]] = {}
    for why, sites in (item for part in parts for item in _surveyed(part).left.items()):
        left[why] = (*left.get(why, ()), *sites)
    surveyed = Survey(tuple(unit for part in parts for unit in _surveyed(part).units), left)
    found = [part for part in parts if isinstance(part, Static)]
    if not found:
        return surveyed
    searched = [part.searched for part in found]
    chosen = [one.best.plan for one in searched if one.best is not None]
    best = _best(parts)
    nearest = [one.nearest for one in searched if one.nearest is not None]
    return Static(
        model,
        surveyed,
        Statistics({name: one for part in found for name, one in part.statistics.items()}),
        _joined_plan([part.plan for part in found]),
        _joined_noise(found),
        {name: gain for part in found for name, gain in part.keepers.items()},
        tuple(site for part in found for site in part.kept),
        Searched(
            best and replace(best, plan=_joined_plan(chosen)),
            max(nearest, key=lambda one: one.judgement.score, default=None),
            tuple(trial for one in searched for trial in one.trials),
            tuple(site for one in searched for site in one.unfused),
        ),
    )


def _surveyed(found: Static | Survey) -> Survey:
    return found.surveyed if isinstance(found, Static) else found


def _best(parts: Sequence[Static | Survey]) -> Candidate | None:
    """The last candidate within the budget, which has those of the parts before it."""
    candidates = [part.searched.best for part in parts if isinstance(part, Static)]
    return next((one for one in reversed(candidates) if one is not None), None)


def _joined_plan(plans: Sequence[Plan]) -> Plan:
    joined = plans[0]
    for plan in plans[1:]:
        joined = replace(
            joined,
            nodes=joined.nodes | plan.nodes,
            tensors=joined.tensors | plan.tensors,
            params={**joined.params, **plan.params},
            rounded={**joined.rounded, **plan.rounded},
            biases={**joined.biases, **plan.biases},
        )
    return joined


def _joined_noise(parts: Sequence[Static]) -> Noise:
    def measure(sources: Sequence[Source]) -> Mapping[Source, float]:
        known = {source: noise for part in parts for source, noise in part.noise(sources).items()}
        return {source: known[source] for source in sources if source in known}

    joined = Noise(sources_of(unit for part in parts for unit in part.surveyed.units), measure)
    joined.known = {source: noise for part in parts for source, noise in part.noise.known.items()}
    return joined
