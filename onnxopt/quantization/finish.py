"""Quantize at run time what static quantization leaves in floating point, or all of it.

Such kernels cost a look at each input and need no calibration: of recurrent layers the runtime has no others,
and products that the search left in float for their accuracy may do in 8 bits where each input has its own
range. Small and recurrent models are as fast, and nearer to the original, without any static range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from onnxopt.graph import nodes
from onnxopt.ledger import site_of
from onnxopt.model import clone
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.keep import veto_of
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


@dataclass(frozen=True)
class Finisher:
    """Tries passes at the end, each alone, and keeps those that keep the budget and pay.

    passes: as a recipe spells them, in their order. tidy: what follows each of them. kept: sites of
    nodes that stay in floating point.
    judge: says whether a candidate keeps the budget. pays: whether one candidate is better than another.
    """

    passes: tuple[str, ...]
    tidy: Callable[[ir.Model], ir.Model]
    kept: frozenset[str]
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
            pipeline = Pipeline((parse_pass(name),), rounds=1)
            outcome = pipeline.run(partial(clone, found.model), veto=veto_of(self.kept))
            if not outcome.changes:
                continue
            sites = _rewritten(found.model, outcome.model)
            model = self.tidy(outcome.model)
            judgement = self.judge(model)
            kept, why = self.pays(found.model, model) if judgement.ok else (False, judgement.summary)
            found = replace(found, tried=(*found.tried, Finish(name, kept, why, sites)))
            if kept:
                found = replace(found, model=model, judgement=judgement)
        return found


def _rewritten(before: ir.Model, after: ir.Model) -> tuple[str, ...]:
    """The nodes that have another operator afterwards."""
    left = {site_of(node): node.op_type for node in nodes(after)}
    return tuple(site for node in nodes(before) if left.get(site := site_of(node)) != node.op_type)
