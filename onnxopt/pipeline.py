"""Passes in order, to a fixed point; and what to do when one of them breaks the model.

Structure is checked after each pass, numbers once at the end. Where either fails, the pipeline
starts again from the input with fewer rewrites, finds the one that breaks the model by bisection,
leaves that one out and goes on. Nothing is kept for this but the way to open the input again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt import collector
from onnxopt.attempt import WHOLE, Attempt, attempt
from onnxopt.claims import Kind, kind_of, pass_name
from onnxopt.graph import function_name, value_names
from onnxopt.ledger import Ledger, Rewrite
from onnxopt.structure import all_problems, checker_complaint

__all__ = ["LeftOut", "Outcome", "Pipeline", "Proof", "Step"]

Proof = Callable[[ir.Model, Kind], str | None]
"""Judges a rewritten model by the weakest promise of the passes that changed it; None, or what fails."""

_PATIENCE = 8
"""Single rewrites of one pass that are left out before the pass is left out whole."""


@dataclass(frozen=True)
class Step:
    """What one pass did, over all rounds.

    changes: rewrites made. declined: reason -> the places it holds for. seconds: wall time.
    nodes, bytes: change in the number of nodes and in bytes of tensors (negative: fewer).
    """

    name: str
    kind: Kind
    changes: int
    declined: Mapping[str, tuple[str, ...]]
    seconds: float
    nodes: int
    bytes: int


@dataclass(frozen=True)
class LeftOut:
    """A rewrite (or a whole pass) that was undone, and what it broke."""

    rewrite: Rewrite
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The rewritten model and how it came about; granted: the rewrites, in their order."""

    model: ir.Model
    kind: Kind
    steps: tuple[Step, ...]
    granted: tuple[Rewrite, ...]
    left_out: tuple[LeftOut, ...]
    rounds: int
    settled: bool
    """False where the passes still changed the graph when the last round ended."""

    @property
    def changes(self) -> int:
        """Rewrites made in all."""
        return sum(step.changes for step in self.steps)


@dataclass(frozen=True)
class Pipeline:
    """Passes in their order, again and again until nothing changes, `rounds` times at most."""

    passes: tuple[ir.passes.PassBase, ...]
    rounds: int = 12

    def run(
        self,
        open_model: Callable[[], ir.Model],
        *,
        prove: Proof | None = None,
        veto: Callable[[str, str], str | None] | None = None,
        stop_after: int | None = None,
        on_pass: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Rewrite a model; what cannot be kept is left out, reported, and the rest goes on.

        Args:
            open_model: gives a fresh copy of the input at each call.
            prove: judges the numbers of the result; None to check structure only.
            veto: asked with the name of a pass that is about to rewrite, and where; why it may not, or None.
            stop_after: make this many rewrites, then stop.
            on_pass: called with the name of each pass before it runs.
        """
        left_out: dict[Rewrite, str] = {}

        @functools.cache
        def tolerated() -> frozenset[str]:
            return all_problems(open_model())

        @functools.cache
        def sound() -> bool:
            return checker_complaint(open_model()) is None

        def run(limit: int | None, *, watch: bool = False) -> Attempt:
            with collector.put_off():
                model, ledger = open_model(), Ledger(limit, frozenset(left_out), veto)
                return attempt(
                    self.passes, self.rounds, model, ledger, tolerated=tolerated, on_pass=on_pass, watch=watch
                )

        def judge(done: Attempt) -> str | None:
            if done.problem is None and done.ledger.granted:
                complaint = checker_complaint(done.model)
                done.problem = complaint if complaint and sound() else None
                if done.problem is None and prove:
                    done.problem = prove(done.model, done.kind)
            return done.problem

        while judge(done := run(stop_after)) is not None:
            watched = run(stop_after, watch=True) if done.blamed is None and not left_out else done
            culprit, problem = _culprit(watched if watched.blamed else done, run, judge)
            left_out[_widen(culprit, left_out)] = problem
        model = done.model if done.ledger.granted else open_model()
        undone = tuple(LeftOut(rewrite, reason) for rewrite, reason in left_out.items())
        granted = tuple(done.ledger.granted)
        return Outcome(model, done.kind, _steps(done), granted, undone, done.rounds, done.settled)


def _culprit(
    failed: Attempt, run: Callable[[int | None], Attempt], judge: Callable[[Attempt], str | None]
) -> tuple[Rewrite, str]:
    """The rewrite without which the ones before it hold, and what it breaks.

    Bisection over how many rewrites are granted. Broken structure is looked for among the rewrites of
    the pass that left it, and by structure alone, so that numbers broken before are not mixed in.
    """
    ledger, blamed, problem = failed.ledger, failed.blamed, failed.problem or ""
    good, bad = (0 if blamed is None else failed.first), len(ledger.granted)
    if blamed is not None:
        again = run(bad) if bad > good else None
        if again is None or again.problem is None:  # it breaks between its rewrites, or without any
            return ledger.visiting or Rewrite(pass_name(blamed), WHOLE, ""), problem
        problem = again.problem
    while bad - good > 1:
        middle = (good + bad) // 2
        trial = run(middle)
        found = judge(trial) if blamed is None else trial.problem
        if found is None:
            good = middle
        else:
            bad, problem = middle, found
    return ledger.granted[bad - 1], problem


def _widen(culprit: Rewrite, left_out: Mapping[Rewrite, str]) -> Rewrite:
    """The whole pass, once too many of its rewrites are left out or leaving one out did not help."""
    already = sum(other.pass_name == culprit.pass_name for other in left_out)
    out_of_patience = already >= _PATIENCE or culprit in left_out
    return Rewrite(culprit.pass_name, WHOLE, "") if out_of_patience else culprit


def _steps(done: Attempt) -> tuple[Step, ...]:
    """What each pass did; a place that later rewrites took away is no near miss."""
    steps, places = [], {""}
    if done.ledger.declined:
        places |= value_names(done.model) | set(map(function_name, done.model.functions))
    for one, tally in zip(done.passes, done.tallies, strict=True):
        name, reasons = pass_name(one), dict[str, list[str]]()
        for rewrite, reason in done.ledger.declined.items():
            if rewrite.pass_name == name and rewrite.site in places:
                reasons.setdefault(reason, []).append(rewrite.site)
        declined = {reason: tuple(sites) for reason, sites in reasons.items()}
        steps.append(
            Step(name, kind_of(one), tally.changes, declined, tally.seconds, tally.nodes, tally.bytes)
        )
    return tuple(steps)
