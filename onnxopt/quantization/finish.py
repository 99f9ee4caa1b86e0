"""Quantize at run time what static quantization leaves in floating point, or all of it.

Such kernels cost a look at each input and need no calibration: of recurrent layers the runtime has no others,
and products that the search left in float for their accuracy may do in 8 bits where each input has its own
range. Small and recurrent models are as fast, and nearer to the original, without any static range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import onnx_ir as ir

from onnxopt.claims import spelling
from onnxopt.graph import nodes
from onnxopt.ledger import site_of
from onnxopt.model import clone
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.keep import veto_of
from onnxopt.quantization.units import HEAVY

__all__ = ["COUNTED", "Finish", "Finished", "Finisher"]

_ALONE = 48
"""Nodes that are tried one by one, at most, to find out what each costs."""
COUNTED = HEAVY | {"Gather"}
"""Operators whose weights or products passes quantize."""

_ASKED = "it is to stay in floating point"
_COSTLY = "it costs more accuracy than the budget has"

Pays = Callable[[ir.Model, ir.Model], tuple[bool, str]]
"""Whether the second model is better than the first, and the figures."""


@dataclass(frozen=True)
class Finish:
    """Something tried at the end: whether it is kept, why or why not, and the nodes that it rewrote.

    left: reason -> the nodes that it could not rewrite, or not within the budget.
    """

    name: str
    kept: bool
    why: str
    sites: tuple[str, ...] = ()
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    def rewritten(self) -> dict[str, str]:
        """The nodes that passes rewrote, and which pass."""
        return {site: one.name for one in self.tried if one.kept for site in one.sites}


class _Trial(NamedTuple):
    """judgement: None where nothing was rewritten."""

    model: ir.Model
    sites: tuple[str, ...]
    left: Mapping[str, tuple[str, ...]]
    judgement: Judgement | None

    @property
    def ok(self) -> bool:
        return self.judgement is not None and self.judgement.ok


@dataclass(frozen=True)
class Finisher:
    """Tries passes at the end, each alone, and keeps those that keep the budget and pay.

    passes: in their order. tidy: what follows each of them. kept: sites of nodes that stay in floating point.
    noise: gives site -> what it costs in accuracy, for some sites, as far as that is known. judge: says
    whether a candidate keeps the budget. pays: whether one candidate is better than another.
    """

    passes: tuple[ir.passes.PassBase, ...]
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
        both = self.finished(quantized) if any(one.sites for one in alone.tried) else quantized
        if alone.judgement is None:
            return both
        better, why = self.pays(alone.model, both.model)
        compared = Finish("static quantization", better, f"against ranges found at run time alone: {why}")
        winner = both if better else alone
        return replace(winner, tried=(*winner.tried, compared))

    def finished(self, found: Finished) -> Finished:
        """The model after those passes that keep the budget and pay; what is given is not changed."""
        for one in self.passes:
            trial = self._most(found.model, one)
            kept, why = False, "there is nothing that it applies to"
            if trial.judgement is not None:
                why = trial.judgement.summary
            if trial.ok:
                kept, why = self.pays(found.model, trial.model)
            if trial.sites or trial.left:
                finish = Finish(spelling(one), kept, why, trial.sites, trial.left)
                found = replace(found, tried=(*found.tried, finish))
            if kept:
                found = replace(found, model=trial.model, judgement=trial.judgement)
        return found

    def _most(self, model: ir.Model, one: ir.passes.PassBase) -> _Trial:
        """A pass on as many nodes as the budget allows, those first that cost least accuracy.

        On all of them where it allows none.
        """
        best = self._trial(model, one, ())
        if best.judgement is None or best.ok:
            return best
        order = self._ordered(model, one, best.sites)
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            trial = self._trial(model, one, order[middle:])
            if trial.ok:
                best, low = trial, middle
            else:
                high = middle
        return best

    def _ordered(self, model: ir.Model, one: ir.passes.PassBase, sites: Sequence[str]) -> list[str]:
        """Sites in the order of what they cost in accuracy; where that is not known, as each does alone.

        Of many whose noise is not known the last ones come first: errors of theirs have the shortest way.
        """
        noise = self.noise(sites)
        if all(site in noise for site in sites):
            return sorted(sites, key=lambda site: noise[site])
        if len(sites) > _ALONE:
            return list(reversed(sites))
        scores = {}
        for site in sites:
            judgement = self._trial(model, one, [other for other in sites if other != site]).judgement
            scores[site] = judgement.score if judgement is not None else -math.inf
        return sorted(sites, key=lambda site: -scores[site])

    def _trial(self, model: ir.Model, one: ir.passes.PassBase, costly: Sequence[str]) -> _Trial:
        kept = {**dict.fromkeys(costly, _COSTLY), **dict.fromkeys(sorted(self.kept), _ASKED)}
        outcome = Pipeline((one,), rounds=1).run(partial(clone, model), veto=veto_of(kept))
        left = outcome.steps[0].declined
        if not outcome.changes:
            return _Trial(model, (), left, None)
        there = {site_of(node) for node in nodes(model) if node.op_type in COUNTED}
        sites = tuple(dict.fromkeys(rewrite.site for rewrite in outcome.granted if rewrite.site in there))
        tidied = self.tidy(outcome.model)
        return _Trial(tidied, sites, left, self.judge(tidied))
