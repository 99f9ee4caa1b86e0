"""The strongest pruning that keeps a budget, and the weakest that is fast enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import onnx_ir as ir

from onnxopt.claims import options_of, spelling
from onnxopt.pipeline import Step
from onnxopt.quantization.judge import Judgement

__all__ = [
    "ByParts",
    "Candidate",
    "Informed",
    "Passes",
    "Searched",
    "Trial",
    "fast_enough",
    "strongest",
    "up_to",
    "weaker",
]

Passes = tuple[ir.passes.PassBase, ...]
_Asked = tuple[tuple[str, tuple[str, ...] | None, bool], ...]

_STEPS = 5
"""Halvings of the strength: a thirty-second of what is asked for."""
_MOST = 8.0
"""What a part's scores are multiplied with, or divided by, at most: scores go with the noise's root."""

_STRENGTH: Mapping[str, Callable[[Any, Any, float], float]] = {
    **dict.fromkeys(("sparsity", "ratio", "percentile"), lambda _, value, share: round(value * share, 6)),
    "threshold": lambda _, value, share: float(f"{value * share:.6g}"),
    **dict.fromkeys(
        ("macs", "parameters", "energy"), lambda _, value, share: round(1 - (1 - value) * share, 6)
    ),
    "number": lambda _, value, share: round(value * share),
    "bits": lambda one, value, share: round(one.most_bits - (one.most_bits - value) * share),
}
"""Option -> from the pass and the value to that at a share of the strength; at 0, what a pass has of them
together prunes nothing, or as little as it can."""


@runtime_checkable
class ByParts(Protocol):
    """A pass that chooses among parts of the model, as layers, by scores that can be weighted."""

    importance: Mapping[str, float] | None
    """Part -> what its scores are multiplied with; 1 where it has none."""
    only: tuple[str, ...] | None
    """Parts that may be pruned; None: all."""

    def parts(self, model: ir.Model) -> Mapping[str, ir.passes.PassBase]:
        """Part -> a pass that prunes as strongly, there alone."""


@runtime_checkable
class Informed(Protocol):
    """A pass that may have to look at samples."""

    def require_samples(self, model: ir.Model) -> None:
        """Raise UsageError where it has none and needs some; the model is a copy to try it on."""


@dataclass(frozen=True)
class Candidate:
    """What passes make of the prepared model. steps: what each did. judgement: what that keeps.

    time: the share of the original's time that it takes at most, as measured; None where it was not.
    """

    passes: Passes
    model: ir.Model
    steps: tuple[Step, ...]
    judgement: Judgement
    time: float | None = None

    @property
    def changes(self) -> int:
        """How often the model was changed."""
        return sum(step.changes for step in self.steps)


@dataclass(frozen=True)
class Trial:
    """A strength, as a share of what is asked for, how that was judged, and what time it took.

    weighted: scores with what the parts of the model matter.
    """

    share: float
    ok: bool
    summary: str
    time: float | None = None
    weighted: bool = False


@dataclass(frozen=True)
class Searched:
    """The strongest candidate that keeps the budget; the weakest one tried, where none does.

    trials: in order. sensitivity: part -> the noise over the signal where it alone is pruned; empty where
    the passes were not weighted. fixed: the passes that have no strength to look for.
    """

    best: Candidate
    trials: tuple[Trial, ...] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    fixed: Passes = ()


def strongest(
    passes: Passes,
    model: ir.Model,
    make: Callable[[Passes], Candidate],
    noise: Callable[[Passes], float],
    *,
    guarded: bool,
) -> Searched:
    """Look for the strongest pruning that keeps the budget, as a share of what `passes` ask for.

    As they are first. Where that loses too much, each part of the model is pruned alone, scores are weighted
    with the noise that this makes, and the share is bisected, 5 times: of the amounts, or where a pass has
    none, as of N:M patterns, of the parts. A share that loses too much so is tried without weights, too.

    Args:
        passes: at the full strength.
        model: that they are for; not changed.
        make: runs passes on a copy of it and judges the result.
        noise: runs them and gives the noise of the outputs over the signal.
        guarded: whether there is a budget; without one there is no search.
    """
    found = _Found(make)
    if found.keeps(passes, 1.0) or not guarded:
        return found.searched()
    weighted, sensitivity = _weighted(passes, model, noise)
    fixed = tuple(one for one in weighted if not (_strengths(one) or _ranked(one)))
    low, high = 0.0, 2.0 if sensitivity else 1.0
    for _ in range(_STEPS + bool(sensitivity)):
        share = (low + high) / 2
        some = tuple(weaker(one, share) for one in weighted)
        plain = tuple(weaker(one, share) for one in passes)
        if not (found.keeps(some, share, weighted=bool(sensitivity)) or found.keeps(plain, share)):
            high = share
        elif share == 1.0:
            break
        else:
            low = share
    return found.searched(sensitivity=sensitivity, fixed=fixed)


class _Found:
    """The strongest candidate that keeps the budget so far, else the last one tried; and all trials."""

    def __init__(self, make: Callable[[Passes], Candidate]) -> None:
        self._make, self._tried = make, dict[_Asked, bool]()
        self.best: Candidate | None = None
        self.trials: list[Trial] = []

    def keeps(self, passes: Passes, share: float, *, weighted: bool = False) -> bool:
        """Whether passes keep the budget; what was tried before is not tried again."""
        asked = _asked(passes)
        if asked not in self._tried:
            made = self._make(passes)
            ok = self._tried[asked] = made.judgement.ok
            self.trials.append(Trial(share, ok, made.judgement.summary, None, weighted))
            if ok or self.best is None or not self.best.judgement.ok:
                self.best = made
        return self._tried[asked]

    def searched(self, **more: Any) -> Searched:
        assert self.best is not None  # something was tried
        return Searched(self.best, tuple(self.trials), **more)


def fast_enough(passes: Passes, make: Callable[[Passes], Candidate], latency: float) -> Searched:
    """Look for the weakest pruning that takes at most this share of the time; 5 halvings of the strength.

    Where there is none, the fastest one that was tried. What changes nothing was asked too much.

    Args:
        passes: at the full strength.
        make: runs passes on a copy of the model, judges the result and measures its time.
        latency: share of the original's time.
    """
    tried: dict[float, Candidate] = {}
    low, high, share = 0.0, 1.0, 1.0
    fixed = tuple(one for one in passes if not _strengths(one))
    for _ in range(1 + (_STEPS if len(fixed) < len(passes) else 0)):
        asked = passes if share == 1.0 else tuple(weaker(one, share) for one in passes)
        one = tried[share] = make(asked)
        if not one.changes or _time(one) <= latency:
            high = share
        elif share == 1.0:
            break
        else:
            low = share
        share = (low + high) / 2
    enough = {share: bool(one.changes) and _time(one) <= latency for share, one in tried.items()}
    weakest = min((share for share, ok in enough.items() if ok), default=None)
    best = min(tried.values(), key=_time) if weakest is None else tried[weakest]
    trials = tuple(Trial(s, enough[s], one.judgement.summary, one.time) for s, one in tried.items())
    return Searched(best, trials, fixed=fixed)


def _time(candidate: Candidate) -> float:
    assert candidate.time is not None  # it was measured
    return candidate.time


def _asked(passes: Passes) -> _Asked:
    """What tells one run of passes from another."""
    return tuple(
        (spelling(one), getattr(one, "only", None), bool(getattr(one, "importance", None))) for one in passes
    )


def up_to(one: ir.passes.PassBase, macs: float) -> ir.passes.PassBase:
    """The pass with an amount, where it says none: this share of multiply-adds to keep, or half of the zeros.

    N:M patterns and masks say how much, too.
    """
    if any(value is not None for value in _amounts(one).values()):
        return one
    if hasattr(one, "macs"):
        return replace(one, macs=macs)  # type: ignore[type-var]
    says = getattr(one, "nm", None) or getattr(one, "masks", None)
    return replace(one, sparsity=0.5) if hasattr(one, "sparsity") and not says else one  # type: ignore[type-var]


def weaker(one: ir.passes.PassBase, share: float) -> ir.passes.PassBase:
    """The pass at a share of its strength: of its amount, or else of the parts, those of least importance.

    One that has neither stays as it is.
    """
    ranked, strengths = _ranked(one), _strengths(one)
    if ranked and not strengths:
        least = ranked[: round(share * len(ranked))]
        return replace(one, only=None if least == ranked else least, importance=None)  # type: ignore[type-var]
    return replace(one, **{name: _STRENGTH[name](one, value, share) for name, value in strengths.items()})  # type: ignore[type-var]


def _strengths(one: ir.passes.PassBase) -> dict[str, Any]:
    """The amounts of a pass that can be less."""
    given = {name: value for name, value in _amounts(one).items() if value}
    return {name: value for name, value in given.items() if _STRENGTH[name](one, value, 0.0) != value}


def _ranked(one: ir.passes.PassBase) -> tuple[str, ...]:
    """The parts that a pass chooses among, those of least importance first; none where that is not known."""
    known = getattr(one, "importance", None) or {}
    return tuple(sorted(known, key=lambda part: known[part]))


def _amounts(one: ir.passes.PassBase) -> dict[str, Any]:
    """The options of a pass that say how much it prunes; None where one is not given."""
    found = {option.name: getattr(one, option.name) for option in options_of(one)}
    return {name: value for name, value in found.items() if name in _STRENGTH}


def _weighted(
    passes: Passes, model: ir.Model, noise: Callable[[Passes], float]
) -> tuple[Passes, dict[str, float]]:
    """The passes with the importance of parts, and part -> the noise that pruning it alone makes."""
    found: dict[str, float] = {}
    weighted = []
    for one in passes:
        if not isinstance(one, ByParts):
            weighted.append(one)
            continue
        alone = {part: noise((only,)) for part, only in one.parts(model).items()}
        heard = [math.log(value) for value in alone.values() if 0 < value < math.inf]
        typical = math.exp(sum(heard) / len(heard)) if heard else 1.0
        importance = {
            part: min(max(math.sqrt(value / typical), 1 / _MOST), _MOST) for part, value in alone.items()
        }
        found |= alone
        weighted.append(replace(one, importance=importance))  # type: ignore[type-var]
    return tuple(weighted), found
