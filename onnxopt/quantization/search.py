"""Find the fastest quantization that keeps the budget.

The price of noise goes up from zero, where the choice is the fastest, until a candidate keeps the budget
on held-out samples, and then back by halves towards the last that did not. Each candidate is written, run
by the runtime and judged; nothing is taken from a prediction alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxopt.model import clone
from onnxopt.quantization.choose import Choice, Prices, choose
from onnxopt.quantization.emit import emit
from onnxopt.quantization.fusion import Fusion, fusion_of
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.units import Survey, survey
from onnxopt.targets import Placement

__all__ = ["Candidate", "Trial", "search", "write"]

_STEP = 4.0
"""The factor from one price of noise to the next."""
_STEPS = 24
_HALVES = 6
_ROUNDS = 3
"""How often nodes that the runtime does not fuse may be found and left in floating point."""


@dataclass(frozen=True)
class Trial:
    """A choice that was judged.

    units: how many are quantized. ratio: the expected cost over that of the float graph. noise: expected.
    """

    units: int
    ratio: float
    noise: float
    judgement: Judgement


@dataclass(frozen=True)
class Candidate:
    """A quantized model, and what is known of it."""

    model: ir.Model
    plan: Plan
    choice: Choice
    judgement: Judgement
    fusion: Fusion | None


@dataclass(frozen=True)
class Searched:
    """What was tried; the best candidate within the budget, and where there is none, the nearest to it."""

    best: Candidate | None
    nearest: Candidate | None
    trials: tuple[Trial, ...]
    unfused: tuple[str, ...]


def write(model: ir.Model, placement: Placement, plan: Plan) -> tuple[ir.Model, dict[str, ir.Node]]:
    """A quantized copy of a float model, and its quantized nodes by site."""
    own = clone(model)
    return own, emit(own, survey(own, placement, plan.params).units, plan, placement)


def search(
    model: ir.Model,
    surveyed: Survey,
    placement: Placement,
    plan: Plan,
    noise: Mapping[Source, float],
    prices: Prices,
    judge: Judge,
    *,
    kept: Sequence[str] = (),
    forced: Sequence[str] = (),
    proves: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Searched:
    """The fastest candidate within the budget.

    Args:
        model: in floating point, prepared.
        surveyed: its units.
        placement: what the target takes.
        plan: how tensors and weights are quantized; its choice of units does not matter.
        noise: of each source.
        prices: of nodes and borders.
        judge: says whether a candidate keeps the budget.
        kept: sites that stay in floating point. forced: sites that become integers where the budget lets them.
        proves: nodes that the runtime here does not fuse are found, and stay in floating point.
        progress: called with what is being tried.
    """
    done = _Search(model, surveyed, placement, plan, noise, prices, judge, list(kept), forced, progress)
    return done.run(_ROUNDS if proves and placement.outputs else 0)


class _Search:
    def __init__(
        self,
        model: ir.Model,
        surveyed: Survey,
        placement: Placement,
        plan: Plan,
        noise: Mapping[Source, float],
        prices: Prices,
        judge: Judge,
        kept: list[str],
        forced: Sequence[str],
        progress: Callable[[str], None],
    ) -> None:
        self._model, self._units, self._placement, self._plan = model, surveyed.units, placement, plan
        self._noise, self._prices, self._judge = noise, prices, judge
        self._kept, self._forced, self._progress = kept, forced, progress
        self._trials: dict[frozenset[str], tuple[Trial, Candidate]] = {}
        self._unfused: list[str] = []

    def run(self, rounds: int) -> Searched:
        best = self._cheapest()
        for _ in range(rounds):
            if best is None:
                break
            model, sites = write(self._model, self._placement, best.plan)
            fusion = fusion_of(model, sites)
            best = replace(best, fusion=fusion)
            if not fusion.unfused:
                break
            self._unfused += fusion.unfused
            self._kept += fusion.unfused
            best = self._cheapest()
        trials = tuple(trial for trial, _ in self._trials.values())
        nearest = max((c for _, c in self._trials.values()), key=lambda c: c.judgement.score, default=None)
        return Searched(best, nearest, trials, tuple(self._unfused))

    def _cheapest(self) -> Candidate | None:
        """The candidate of the lowest price of noise that keeps the budget."""
        free = self._try(0.0)
        if free is None or free.judgement.ok:
            return free
        price = low = free.choice.before / max(free.choice.noise, 1e-12) / _STEP**4
        found: Candidate | None = None
        for _ in range(_STEPS):
            candidate = self._try(price)
            if candidate is None:
                return None
            if candidate.judgement.ok:
                found = candidate
                break
            low, price = price, price * _STEP
        high = price
        for _ in range(_HALVES if found is not None else 0):
            middle = math.sqrt(low * high)
            candidate = self._try(middle)
            if candidate is not None and candidate.judgement.ok:
                found, high = candidate, middle
            else:
                low = middle
        return found

    def _try(self, price: float) -> Candidate | None:
        """The candidate at a price of noise; None where nothing is left to quantize."""
        choice = choose(
            self._model.graph,
            self._units,
            self._prices,
            self._noise,
            price,
            outputs=self._placement.outputs,
            kept=self._kept,
            forced=self._forced,
        )
        if not choice.nodes:
            return None
        if choice.nodes not in self._trials:
            self._progress(f"trying {len(choice.nodes)} of {len(self._units)} nodes in integers")
            plan = replace(self._plan, nodes=choice.nodes, tensors=choice.tensors)
            model, _ = write(self._model, self._placement, plan)
            judgement = self._judge(model)
            trial = Trial(len(choice.nodes), choice.after / choice.before, choice.noise, judgement)
            self._trials[choice.nodes] = trial, Candidate(model, plan, choice, judgement, None)
        return self._trials[choice.nodes][1]
