"""Passes in order, to a fixed point; and what to do when one of them breaks the model.

Structure is checked after each pass, numbers once at the end. Where either fails, the pipeline
starts again from the input with fewer rewrites, finds the one that breaks the model by bisection,
leaves that one out and goes on. Nothing is kept for this but the way to open the input again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxopt.errors import ModelError
from onnxopt.graph import nodes, tensor_bytes
from onnxopt.ledger import Ledger, Rewrite
from onnxopt.rewrite import Rule, drive
from onnxopt.structure import checker_complaint, find_problem, signature_of

__all__ = ["Kind", "LeftOut", "Outcome", "Pass", "Pipeline", "Proof", "Step", "pass_name", "spelling"]

Kind = Literal["exact", "reorder", "lossy"]
"""The promise of a pass: bit-equal, equal but for the order of float operations, worse within a budget."""

Proof = Callable[[ir.Model, Kind], str | None]
"""Judges a rewritten model by the weakest promise of the passes that changed it; None, or what fails."""

_KINDS: tuple[Kind, ...] = ("exact", "reorder", "lossy")
_WHOLE = "the whole pass"
_PATIENCE = 8
"""Single rewrites of one pass that are left out before the pass is left out whole."""


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A claim about a graph. Subclasses are frozen dataclasses whose fields are the options.

    A pass of rules overrides `rules`; another overrides `apply` and asks `ledger.claim` before each change.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "exact"
    keeps_signature: ClassVar[bool] = True

    def rules(self) -> Sequence[Rule]:
        """The rules of the pass, in the order in which they are tried."""
        return ()

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        """Rewrite the model in place, each change with leave of the ledger."""
        drive(model, self.rules(), ledger)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run alone, as any onnx_ir pass."""
        ledger = Ledger(pass_name=self.name)
        self.apply(model, ledger)
        return ir.passes.PassResult(model, bool(ledger.granted))

    def __str__(self) -> str:
        """The pass as a recipe spells it: `name{option=value}`, options at their default left out."""
        options = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def pass_name(one: ir.passes.PassBase) -> str:
    """The name of a pass; a plain onnx_ir pass goes by its class."""
    return one.name if isinstance(one, Pass) else type(one).__name__


def _kind(one: ir.passes.PassBase) -> Kind:
    """The promise of a pass; a plain onnx_ir pass makes none, and is taken to keep the numbers."""
    return one.kind if isinstance(one, Pass) else "reorder"


def spelling(one: ir.passes.PassBase) -> str:
    """The pass as a recipe spells it; a plain onnx_ir pass by its name alone."""
    return str(one) if isinstance(one, Pass) else pass_name(one)


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
    """The rewritten model and how it came about."""

    model: ir.Model
    kind: Kind
    steps: tuple[Step, ...]
    left_out: tuple[LeftOut, ...]
    rounds: int
    settled: bool
    """False where the passes still changed the graph when the last round ended."""

    @property
    def changes(self) -> int:
        """Rewrites made in all."""
        return sum(step.changes for step in self.steps)


@dataclass
class _Tally:
    changes: int = 0
    seconds: float = 0.0
    nodes: int = 0
    bytes: int = 0


@dataclass
class _Attempt:
    """One run over the passes, up to its end or to the first pass that broke the model."""

    model: ir.Model
    ledger: Ledger
    tallies: list[_Tally]
    rounds: int = 0
    settled: bool = False
    problem: str | None = None
    blamed: ir.passes.PassBase | None = None
    first: int = 0
    """How many rewrites were granted before the pass to blame began."""
    changed: set[int] = field(default_factory=set)


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
        stop_after: int | None = None,
        on_pass: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Rewrite a model; what cannot be kept is left out, reported, and the rest goes on.

        Args:
            open_model: gives a fresh copy of the input at each call.
            prove: judges the numbers of the result; None to check structure only.
            stop_after: make this many rewrites, then stop.
            on_pass: called with the name of each pass before it runs.
        """
        ready = [open_model()]
        sound = checker_complaint(ready[0]) is None
        left_out: dict[Rewrite, str] = {}

        def attempt(limit: int | None) -> _Attempt:
            model = ready.pop() if ready else open_model()
            return self._attempt(model, Ledger(limit, frozenset(left_out)), on_pass)

        def verdict(done: _Attempt) -> str | None:
            if done.problem is None and done.ledger.granted:
                complaint = checker_complaint(done.model) if sound else None
                done.problem = complaint or (prove(done.model, self._kind(done)) if prove else None)
            return done.problem

        while (problem := verdict(done := attempt(stop_after))) is not None:
            culprit = self._culprit(done, attempt, verdict)
            left_out[self._widen(culprit, left_out)] = problem
        return self._outcome(done, left_out)

    def _attempt(self, model: ir.Model, ledger: Ledger, on_pass: Callable[[str], None] | None) -> _Attempt:
        done = _Attempt(model, ledger, [_Tally() for _ in self.passes])
        signature, size, quiet = signature_of(model), self._size(model), 0
        for number, (position, one) in enumerate(self._turns()):
            done.rounds = number // len(self.passes) + 1
            ledger.pass_name, done.first, done.blamed = pass_name(one), len(ledger.granted), one
            ledger.touched.clear()
            if on_pass:
                on_pass(ledger.pass_name)
            started = time.perf_counter()
            try:
                done.model = _apply(one, done.model, ledger)
            except Exception as error:
                done.problem = f"{type(error).__name__}: {error}"
                return done
            tally, changes = done.tallies[position], len(ledger.granted) - done.first
            if changes:
                if not getattr(one, "keeps_signature", True):
                    signature = signature_of(done.model)
                elif signature_of(done.model) != signature:
                    done.problem = "graph inputs or outputs changed"
                    return done
                done.problem = find_problem(done.model, ledger.touched)
                if done.problem is not None:
                    return done
                done.changed.add(position)
                tally.changes += changes
                after = self._size(done.model)
                tally.nodes += after[0] - size[0]
                tally.bytes += after[1] - size[1]
                size = after
            tally.seconds += time.perf_counter() - started
            quiet = 0 if changes else quiet + 1
            if ledger.exhausted or quiet == len(self.passes):
                done.settled = True
                break
        done.blamed = None
        return done

    def _turns(self) -> Iterator[tuple[int, ir.passes.PassBase]]:
        for _ in range(self.rounds):
            yield from enumerate(self.passes)

    @staticmethod
    def _size(model: ir.Model) -> tuple[int, int]:
        return sum(1 for _ in nodes(model)), tensor_bytes(model)

    def _kind(self, done: _Attempt) -> Kind:
        return max(
            (_kind(self.passes[position]) for position in done.changed), key=_KINDS.index, default="exact"
        )

    def _culprit(
        self,
        failed: _Attempt,
        attempt: Callable[[int | None], _Attempt],
        verdict: Callable[[_Attempt], str | None],
    ) -> Rewrite:
        """The rewrite without which the ones before it hold: bisection over how many are granted."""
        granted = failed.ledger.granted
        if failed.blamed is not None and len(granted) == failed.first:
            return Rewrite(pass_name(failed.blamed), _WHOLE, "")
        good = failed.first if failed.blamed is not None else 0
        bad = len(granted)
        while bad - good > 1:
            middle = (good + bad) // 2
            if verdict(attempt(middle)) is None:
                good = middle
            else:
                bad = middle
        return granted[bad - 1]

    @staticmethod
    def _widen(culprit: Rewrite, left_out: Mapping[Rewrite, str]) -> Rewrite:
        """The whole pass, once too many of its rewrites are left out or leaving one out did not help."""
        already = sum(other.pass_name == culprit.pass_name for other in left_out)
        whole = Rewrite(culprit.pass_name, _WHOLE, "")
        if whole in left_out:
            raise ModelError(f"{culprit.pass_name}: breaks the model even with all its rewrites left out")
        return whole if already >= _PATIENCE or culprit in left_out else culprit

    def _outcome(self, done: _Attempt, left_out: Mapping[Rewrite, str]) -> Outcome:
        steps = []
        for one, tally in zip(self.passes, done.tallies, strict=True):
            reasons: dict[str, list[str]] = {}
            for rewrite, reason in done.ledger.declined.items():
                if rewrite.pass_name == pass_name(one):
                    reasons.setdefault(reason, []).append(rewrite.site)
            declined = {reason: tuple(sites) for reason, sites in reasons.items()}
            kind = _kind(one)
            steps.append(
                Step(pass_name(one), kind, tally.changes, declined, tally.seconds, tally.nodes, tally.bytes)
            )
        undone = tuple(LeftOut(rewrite, reason) for rewrite, reason in left_out.items())
        return Outcome(done.model, self._kind(done), tuple(steps), undone, done.rounds, done.settled)


def _apply(one: ir.passes.PassBase, model: ir.Model, ledger: Ledger) -> ir.Model:
    """Run a pass; a plain onnx_ir pass counts as one rewrite, whatever it does."""
    if ledger.leaves_out(Rewrite(ledger.pass_name, _WHOLE, "")):
        return model
    if isinstance(one, Pass):
        one.apply(model, ledger)
        return model
    if not ledger.claim(_WHOLE, ""):
        return model
    result = one(model)
    if result.modified:
        ledger.touch(nodes(result.model))
    else:
        ledger.granted.pop()
    return result.model
