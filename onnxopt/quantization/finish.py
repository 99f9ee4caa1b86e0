"""Quantize at run time what static quantization leaves in floating point, or all of it.

Such kernels cost a look at each input and need no calibration: of recurrent layers the runtime has no others,
and products that the search left in float for their accuracy may do in 8 bits where each input has its own
range. Small and recurrent models are as fast, and nearer to the original, without any static range.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import onnx_ir as ir

from onnxopt.graph import nodes
from onnxopt.ledger import site_of
from onnxopt.model import clone
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.keep import veto_of
from onnxopt.quantization.units import HEAVY
from onnxopt.recipe import parse_pass

__all__ = ["Finish", "Finished", "Finisher"]

Pays = Callable[[ir.Model, ir.Model], tuple[bool, str]]
"""Whether the second model is better than the first, and the figures."""


@dataclass(frozen=True)
class Finish:
    """Something tried at the end: whether it is kept, why or why not, and the nodes that it rewrote."""

    name: str
    kept: bool
    why: str
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A model, the judgement of it (None: of a float model), and what was tried.

    static: whether it has what static quantization did.
    """

    model: ir.Model
    judgement: Judgement | None
    static: bool
    tried: tuple[Finish, ...] = ()

    @property
    def at_run_time(self) -> frozenset[str]:
        """The nodes whose inputs are quantized at run time."""
        return frozenset(site for one in self.tried if one.kept for site in one.sites)


class _Trial(NamedTuple):
    model: ir.Model
    sites: tuple[str, ...]
    judgement: Judgement


@dataclass(frozen=True)
class Finisher:
    """Tries passes at the end, each alone, and keeps those that keep the budget and pay.

    passes: as a recipe spells them, in their order. tidy: what follows each of them. kept: sites of
    nodes that stay in floating point. noise: of sites, site -> how much it costs in accuracy; asked for
    where not all can be quantized.
    judge: says whether a candidate keeps the budget. pays: whether one candidate is better than another.
    """

    passes: tuple[str, ...]
    tidy: Callable[[ir.Model], ir.Model]
    kept: frozenset[str]
    noise: Callable[[Collection[str]], Mapping[str, float]]
    judge: Judge
    pays: Pays

    def best(self, plain: Finished, quantized: Finished | None) -> Finished:
        """The best of what the passes make of a float model, and of its static quantization, if any.

        Where that is not better than the former, it is left out: fixed ranges only lose accuracy then.
        """
        alone = self.finished(plain)
        if quantized is None:
            return alone
        both = self.finished(quantized) if alone.tried else quantized
        if alone.judgement is None:
            return both
        better, why = self.pays(alone.model, both.model)
        compared = Finish("static quantization", better, f"against ranges found at run time alone: {why}")
        winner = both if better else alone
        return replace(winner, tried=(*winner.tried, compared))

    def finished(self, found: Finished) -> Finished:
        """The model after those passes that keep the budget and pay; the one that is given is not changed."""
        for name in self.passes:
            trial = self._most(found.model, name)
            if trial is None:
                continue
            kept, why = False, trial.judgement.summary
            if trial.judgement.ok:
                kept, why = self.pays(found.model, trial.model)
            found = replace(found, tried=(*found.tried, Finish(name, kept, why, trial.sites)))
            if kept:
                found = replace(found, model=trial.model, judgement=trial.judgement)
        return found

    def _most(self, model: ir.Model, name: str) -> _Trial | None:
        """A pass on as many nodes as the budget allows, those first that cost least accuracy.

        On all of them where it allows none; None: the pass changes nothing.
        """
        best = self._trial(model, name, self.kept)
        if best is None or best.judgement.ok:
            return best
        noise = self.noise(best.sites)
        order = sorted(best.sites, key=lambda site: noise.get(site, 0.0))
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            trial = self._trial(model, name, self.kept | frozenset(order[middle:]))
            if trial is not None and trial.judgement.ok:
                best, low = trial, middle
            else:
                high = middle
        return best

    def _trial(self, model: ir.Model, name: str, kept: frozenset[str]) -> _Trial | None:
        pipeline = Pipeline((parse_pass(name),), rounds=1)
        outcome = pipeline.run(partial(clone, model), veto=veto_of(kept))
        if not outcome.changes:
            return None
        sites = _rewritten(model, outcome.model)
        tidied = self.tidy(outcome.model)
        return _Trial(tidied, sites, self.judge(tidied))


def _rewritten(before: ir.Model, after: ir.Model) -> tuple[str, ...]:
    """The heavy nodes that have another operator afterwards."""
    left = {site_of(node): node.op_type for node in nodes(after)}
    heavy = {site_of(node): node.op_type for node in nodes(before) if node.op_type in HEAVY}
    return tuple(site for site, operator in heavy.items() if left.get(site) != operator)
