"""One run over the passes: each timed, each checked for structure where it changed something."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxopt.claims import KINDS, Kind, Pass, kind_of, pass_name
from onnxopt.errors import UsageError
from onnxopt.graph import nodes, tensors
from onnxopt.ledger import Ledger, Rewrite
from onnxopt.protobuf import skeleton
from onnxopt.structure import Signature, find_problem, signature_of

__all__ = ["WHOLE", "Attempt", "Tally", "attempt"]

WHOLE = "the whole pass"


@dataclass
class Tally:
    """What one pass did, over all rounds: rewrites, wall seconds, change in nodes and in bytes of tensors."""

    changes: int = 0
    seconds: float = 0.0
    nodes: int = 0
    bytes: int = 0


@dataclass
class Attempt:
    """A run over the passes, up to its end or to the first pass that broke the model.

    problem: what is broken. blamed: by which pass; None where all passes ran. first: how many rewrites
    were granted before that pass began. settled: whether nothing changed any more at the end.
    """

    passes: Sequence[ir.passes.PassBase]
    model: ir.Model
    ledger: Ledger
    tallies: list[Tally] = field(default_factory=list)
    rounds: int = 0
    settled: bool = False
    problem: str | None = None
    blamed: ir.passes.PassBase | None = None
    first: int = 0

    @property
    def kind(self) -> Kind:
        """The weakest promise among the passes that changed something."""
        changed = (one for one, tally in zip(self.passes, self.tallies, strict=True) if tally.changes)
        return max(map(kind_of, changed), key=KINDS.index, default="exact")


def attempt(
    passes: Sequence[ir.passes.PassBase],
    rounds: int,
    model: ir.Model,
    ledger: Ledger,
    *,
    tolerated: Callable[[], Container[str]],
    on_pass: Callable[[str], None] | None = None,
    watch: bool = False,
) -> Attempt:
    """Run the passes in order, again and again until a whole turn changes nothing, or `rounds` times.

    Args:
        passes, rounds: what to run, and how often at most.
        model: is changed in place, or replaced by a pass that gives another one.
        ledger: grants rewrites.
        tolerated: gives problems of the input, which no pass is blamed for.
        on_pass: called with the name of each pass before it runs.
        watch: look at the whole graph around each pass, and stop where one changed it without leave.
    """
    done = Attempt(passes, model, ledger, [Tally() for _ in passes])
    signature, size, quiet = signature_of(model), ledger.index(model).size, 0
    for number, (one, tally) in enumerate(_turns(passes, done.tallies, rounds)):
        done.rounds = number // len(passes) + 1
        ledger.pass_name, done.first, done.blamed = pass_name(one), len(ledger.granted), one
        ledger.touched.clear()
        if on_pass:
            on_pass(ledger.pass_name)
        started, wanted = time.perf_counter(), len(ledger.opsets_wanted)
        before = _Look.at(done.model) if watch else None
        try:
            done.model = _apply(one, done.model, ledger)
            ledger.visiting = None
            done.problem = _problem(one, done, signature, tolerated)
        except UsageError:  # an option that this model has no use for is the user's to change
            raise
        except Exception as error:
            done.problem = f"{type(error).__name__}: {error}"
        if done.problem is not None:
            return done
        changes = len(ledger.granted) - done.first
        if before is not None and not changes and before.differs(done.model):
            done.problem = "it changed the graph without the ledger's leave"
            return done
        if changes:
            signature, old, size = signature_of(done.model), size, ledger.index(done.model).size
            tally.changes += changes
            tally.nodes += size[0] - old[0]
            tally.bytes += size[1] - old[1]
        tally.seconds += time.perf_counter() - started
        quiet = 0 if changes or len(ledger.opsets_wanted) > wanted else quiet + 1
        if ledger.exhausted or quiet == len(passes):
            done.settled = True
            break
    done.blamed = None
    return done


def _turns(
    passes: Sequence[ir.passes.PassBase], tallies: Sequence[Tally], rounds: int
) -> Iterator[tuple[ir.passes.PassBase, Tally]]:
    for _ in range(rounds):
        yield from zip(passes, tallies, strict=True)


def _problem(
    one: ir.passes.PassBase, done: Attempt, signature: Signature, tolerated: Callable[[], Container[str]]
) -> str | None:
    """What a pass broke. The signature is held against it even where it says that it changed nothing."""
    keeps = one.keeps_signature if isinstance(one, Pass) else True
    if keeps and signature_of(done.model) != signature:
        return "graph inputs or outputs changed"
    if len(done.ledger.granted) == done.first:
        return None
    return find_problem(done.model, done.ledger.touched, tolerated)


def _apply(one: ir.passes.PassBase, model: ir.Model, ledger: Ledger) -> ir.Model:
    """Run a pass; a plain onnx_ir pass counts as one rewrite, whatever it does."""
    if ledger.leaves_out(Rewrite(ledger.pass_name, WHOLE, "")):
        return model
    if isinstance(one, Pass):
        if not one.operators or ledger.index(model).has(one.operators):
            one.apply(model, ledger)
        return model
    if not ledger.claim(WHOLE, ""):
        return model
    before = _Look.at(model)
    result = one(model)
    if result.modified or before.differs(result.model):  # some do not say what they changed
        ledger.touch(nodes(result.model))
    else:
        ledger.granted.pop()
    return result.model


@dataclass(frozen=True)
class _Look:
    """What a graph is at a moment: its protobuf without weights, and the tensors that are its weights."""

    proto: bytes
    weights: tuple[ir.TensorProtocol, ...]

    @classmethod
    def at(cls, model: ir.Model) -> _Look:
        return cls(skeleton(model).SerializeToString(deterministic=True), tuple(tensors(model)))

    def differs(self, model: ir.Model) -> bool:
        """Whether the model is another one now."""
        now = _Look.at(model)
        same = len(now.weights) == len(self.weights) and all(map(operator.is_, now.weights, self.weights))
        return not same or now.proto != self.proto
