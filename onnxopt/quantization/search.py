"""Find the fastest quantization that keeps the budget.

The price of noise goes up from zero, where the choice is the fastest, until a candidate keeps the budget
on held-out samples, and then back by halves towards the last that did not; units of that one are added as the
budget allows. One that misses it by little gets what keeps the accuracy of its choice alone. Each candidate
is written, run by the runtime and judged; nothing is taken from a prediction alone. Of the best one the
runtime is asked what it runs: nodes that did not become integer kernels are left in floating point, and the
search begins again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxopt.model import clone
from onnxopt.quantization.choose import Choice, Prices, choose, chosen_tensors
from onnxopt.quantization.emit import emit
from onnxopt.quantization.fusion import Fusion, fusion_of
from onnxopt.quantization.judge import Judgement, Judging
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.sensitivity import Noise, Source
from onnxopt.quantization.units import Unit, survey
from onnxopt.targets import Placement

__all__ = ["Candidate", "Search", "Searched", "Trial", "judge_plan", "write"]

_STEP = 4.0
"""The factor from one price of noise to the next."""
_STEPS = 24
_HALVES = 3


@dataclass(frozen=True)
class Trial:
    """A choice that was judged.

    units: how many are quantized. ratio: the expected cost over that of the float graph. noise: expected.
    Both are NaN of a choice that was given.
    """

    units: int
    ratio: float
    noise: float
    judgement: Judgement


@dataclass(frozen=True)
class Candidate:
    """A quantized model, and what is known of it.

    fusion: None where the target's kernels cannot be seen here. keepers: those for its choice alone, name ->
    noise before and after.
    """

    model: ir.Model
    plan: Plan
    judgement: Judgement
    fusion: Fusion | None = None
    keepers: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Searched:
    """What was tried; the best candidate within the budget, and where there is none, the nearest to it.

    unfused: sites that the runtime does not run as integer kernels, which were left in floating point.
    """

    best: Candidate | None
    nearest: Candidate | None
    trials: tuple[Trial, ...]
    unfused: tuple[str, ...]


def write(model: ir.Model, placement: Placement, plan: Plan) -> tuple[ir.Model, dict[str, ir.Node]]:
    """A quantized copy of a float model, and its quantized nodes by site."""
    own = clone(model)
    return own, emit(own, survey(own, placement, plan.params).units, plan, placement)


def judge_plan(
    model: ir.Model,
    units: Sequence[Unit],
    placement: Placement,
    plan: Plan,
    judge: Judging,
    *,
    proves: bool = True,
) -> Searched:
    """The candidate of a plan's own choice, without the units that the runtime does not fuse."""
    unfused: list[str] = []
    while plan.nodes:
        quantized, sites = write(model, placement, plan)
        fusion = fusion_of(quantized, sites) if proves and placement.outputs else None
        if fusion is None or not fusion.unfused:
            judgement = judge(quantized)
            candidate = Candidate(quantized, plan, judgement, fusion)
            trial = Trial(len(plan.nodes), math.nan, math.nan, judgement)
            return Searched(candidate if judgement.ok else None, candidate, (trial,), tuple(unfused))
        unfused += fusion.unfused
        nodes = plan.nodes.difference(unfused)
        plan = replace(plan, nodes=nodes, tensors=chosen_tensors(units, nodes, plan.tensors))
    return Searched(None, None, (), tuple(unfused))


class Search:
    """The search for the fastest candidate within the budget.

    Args:
        model: in floating point, prepared.
        units: those of the model that may be chosen.
        placement: what the target takes.
        plan: how tensors and weights are quantized; its choice of units does not matter.
        noise: of each source; measured where the fastest choice does not keep the budget.
        prices: of nodes and borders.
        judge: says whether a candidate keeps the budget.
        kept: sites that stay in floating point.
        progress: called with what is being tried.
    """

    def __init__(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        placement: Placement,
        plan: Plan,
        noise: Noise,
        prices: Prices,
        judge: Judging,
        *,
        kept: Collection[str] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model, self._units, self._placement, self._plan = model, units, placement, plan
        self._noise, self._prices, self._judge = noise, prices, judge
        self._kept, self._progress = list(kept), progress
        self._improve: Callable[[Candidate], Candidate] | None = None
        self._trials: list[Trial] = []
        self._candidates: dict[tuple[frozenset[str], frozenset[str]], Candidate] = {}
        self._unfused: list[str] = []

    def choices(self) -> Iterator[Plan]:
        """The fastest choice, and where that is beyond the budget one near it. Nothing is tried twice."""
        fastest = self._try(self._choice(0.0))
        if fastest is None:
            return
        yield fastest.plan
        found, failed, _ = self._raised()
        if failed is not None:
            yield (found or failed).plan

    def run(
        self, *, proves: bool = True, improve: Callable[[Candidate], Candidate] = lambda one: one
    ) -> Searched:
        """Search.

        Args:
            proves: nodes that the runtime here does not fuse are found, and stay in floating point.
            improve: gives a candidate with what keeps the accuracy of its choice alone, or the same one; for
                the best, and for those that are near the budget.
        """
        self._improve = improve
        best = self._cheapest()
        while best is not None and proves and self._placement.outputs:
            fusion = fusion_of(*write(self._model, self._placement, best.plan))
            best = replace(best, fusion=fusion)
            if not fusion.unfused:
                break
            self._unfused += fusion.unfused
            self._kept += fusion.unfused
            best = self._cheapest()
        nearest = max(self._candidates.values(), key=lambda c: c.judgement.score, default=None)
        best = improve(best) if best is not None and not best.keepers else best
        return Searched(best, nearest, tuple(self._trials), tuple(self._unfused))

    def _cheapest(self) -> Candidate | None:
        """The fastest candidate that keeps the budget."""
        found, failed, high = self._raised()
        if failed is None:
            return found
        low = high / _STEP
        for _ in range(_HALVES):
            middle = math.sqrt(low * high)
            candidate = self._try(self._choice(middle))
            if candidate is None or candidate.judgement.ok:
                found, high = candidate, middle
            else:
                failed, low = candidate, middle
        return self._filled(found, failed)

    def _raised(self) -> tuple[Candidate | None, Candidate | None, float]:
        """The price goes up: the first candidate within the budget, the last beyond it, the price at the end.

        The former is None where it has nothing left to quantize, the latter where the fastest one will do.
        """
        choice = self._choice(0.0)
        failed = self._try(choice)
        if failed is None or failed.judgement.ok:
            return failed, None, 0.0
        # What is chosen only shrinks as the price rises: nothing else will be asked for.
        weights = (Source("weight", site) for site in choice.nodes)
        self._noise(frozenset([*weights, *(Source("tensor", name) for name in choice.tensors)]))
        choice = self._choice(0.0)
        price = choice.before / (choice.noise or 1.0) / _STEP**4
        for _ in range(_STEPS):
            candidate = self._try(self._choice(price))
            if candidate is None or candidate.judgement.ok:
                return candidate, failed, price
            failed, price = candidate, price * _STEP
        return None, failed, price

    def _filled(self, found: Candidate | None, failed: Candidate) -> Candidate | None:
        """The candidate within the budget, with as many units more of the one beyond as the budget allows.

        The least noisy come first. A cut takes units that pay together at once: there are choices that
        no price of noise gives.
        """
        sure = found.plan.nodes if found is not None else frozenset()
        more = [unit for unit in self._units if unit.site in failed.plan.nodes - sure]
        order = [unit.site for unit in sorted(more, key=self._noise_of)]
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            allowed = sure.union(order[:middle])
            candidate = self._try(self._choice(0.0, [u.site for u in self._units if u.site not in allowed]))
            if candidate is None or candidate.judgement.ok:
                found, low = candidate or found, middle
            else:
                high = middle
        return found

    def _noise_of(self, unit: Unit) -> float:
        names = dict.fromkeys(value.name or "" for value in (*unit.sources, unit.output))
        sources = (Source("weight", unit.site), *(Source("tensor", name) for name in names))
        return sum(self._noise.known.get(source, 0.0) for source in sources)

    def _choice(self, price: float, kept: Collection[str] = ()) -> Choice:
        return choose(
            self._model.graph,
            self._units,
            self._prices,
            self._noise.known,
            price,
            outputs=self._placement.outputs,
            kept=[*self._kept, *kept],
        )

    def _try(self, choice: Choice) -> Candidate | None:
        """The judged candidate of a choice; None where nothing is left to quantize."""
        if not choice.nodes:
            return None
        key = choice.nodes, choice.tensors
        if key not in self._candidates:
            self._progress(f"trying {len(choice.nodes)} of {len(self._units)} nodes in integers")
            plan = replace(self._plan, nodes=choice.nodes, tensors=choice.tensors)
            model, _ = write(self._model, self._placement, plan)
            self._candidates[key] = self._told(choice, Candidate(model, plan, self._judge(model)))
        candidate = self._candidates[key]
        if self._improve is not None and candidate.judgement.near:
            improved = self._improve(candidate)
            if improved is not candidate:
                self._told(choice, improved)
            tried = replace(improved.judgement, near=False)
            self._candidates[key] = replace(improved, judgement=tried)
        return self._candidates[key]

    def _told(self, choice: Choice, candidate: Candidate) -> Candidate:
        ratio = choice.after / choice.before
        self._trials.append(Trial(len(choice.nodes), ratio, choice.noise, candidate.judgement))
        return candidate
