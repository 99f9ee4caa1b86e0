"""The steps of one `optimize`: rewrite under proof, settle the session settings, measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxopt.benchmarking import Timing, bench
from onnxopt.benchmarking.profits import Guard
from onnxopt.benchmarking.settings import Setting, proposals, session_config
from onnxopt.claims import Kind
from onnxopt.data import Feeds
from onnxopt.errors import ProviderError, RuntimeMissingError
from onnxopt.graph import domains
from onnxopt.model import ModelLike
from onnxopt.pipeline import Outcome, Pipeline, Proof
from onnxopt.runtimes import UnsupportedModelError, runtime_version
from onnxopt.targets import STANDARD, Target
from onnxopt.verification import Baseline, Verdict

__all__ = ["Job", "Progress"]

_TIMED = 4
"""Samples that latency is measured on, at most."""
_TRIAL_S = 4.0
"""Seconds to find out whether settings for speed help."""

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1) where that is known."""


@dataclass
class Job:
    """What the steps share, and what they leave for the report."""

    model: ModelLike
    original: ir.Model
    open_model: Callable[[], ir.Model]
    pipeline: Pipeline
    target: Target
    guard: Guard
    shapes: Mapping[str, Sequence[int]] | None
    seed: int
    progress: Progress
    notes: list[str] = field(default_factory=list)
    baseline: Baseline | None = None
    verdict: Verdict | None = None
    frozen: bool = False

    def run(self, *, prove: Proof | None = None, stop_after: int | None = None) -> Outcome:
        """Run the pipeline, and tell of each pass."""
        known = domains(self.original) | STANDARD

        def judge(candidate: ir.Model, kind: Kind) -> str | None:
            strange = set() if self.target.contrib else domains(candidate) - known
            if strange:
                return f"target {self.target.name} takes no operators of {', '.join(sorted(strange))}"
            return prove(candidate, kind) if prove else None

        return self.pipeline.run(
            self.open_model,
            prove=judge,
            veto=self.guard,
            stop_after=stop_after,
            on_pass=lambda name: self.progress(f"rewriting: {name}", None),
        )

    def run_under_proof(self, samples: Sequence[Feeds], stop_after: int | None) -> Outcome:
        """Run the pipeline under proof; where nothing can be shown of the original, make no rewrite."""
        self.progress("running the original", None)
        needed = [one for one in self.settings_for(self.original) if one.purpose == "correctness"]
        baseline = Baseline.measure(self.model, samples, session_config=session_config(needed))
        self.baseline = baseline

        def prove(candidate: ir.Model, kind: Kind) -> str | None:
            self.progress("proving the numbers", None)
            self.verdict = baseline.compare(candidate, kind=kind, frozen=self.frozen)
            return None if self.verdict.ok else self.verdict.reason

        if baseline.unprovable:
            self.notes.append(
                "left as it was: nothing can be proved of this model; --no-verify rewrites it unproved"
            )
            stop_after = 0
        outcome = self.run(prove=prove, stop_after=stop_after)
        if self.verdict is None or not outcome.changes:
            self.verdict = baseline.compare(self.model)
        return outcome

    def settings_for(self, model: ir.Model) -> tuple[Setting, ...]:
        """Settings of the runtime's sessions that may help this model on the target."""
        try:
            runtime = runtime_version().split()[1] if self.target.sessions else ""
        except RuntimeMissingError:
            return ()
        return proposals(model, self.target.provider, runtime) if runtime else ()

    def settle(
        self, model: ir.Model, kind: Kind, samples: Sequence[Feeds], *, measure: bool
    ) -> tuple[Setting, ...]:
        """The settings to propose for a result: those against wrong results, and those that make it faster.

        For speed they are measured on the model where `measure` allows it, else taken for the versions of the
        runtime that they are known for; and the proof must hold with them.
        """
        found = self.settings_for(model)
        settings = [one for one in found if one.purpose == "correctness"]
        for_speed = [one for one in found if one.purpose == "speed"]
        both = session_config([*settings, *for_speed])
        if for_speed and self.baseline is not None and not self.baseline.unprovable:
            kind = (
                "reorder" if kind == "exact" else kind
            )  # another order of fused operators rounds differently
            held = self.baseline.compare(model, kind=kind, frozen=self.frozen, session_config=both)
            if not held.ok:
                self.notes.append(f"not proposed, {_listed(for_speed)}: {held.reason}")
                for_speed = []
        if not for_speed:
            return tuple(settings)
        if not measure:
            unknown = [one for one in for_speed if not one.known]
            if unknown:
                self.notes.append(f"not proposed, {_listed(unknown)}: whether it helps was not measured")
            return (*settings, *(one for one in for_speed if one.known))
        timing = self.time(model, model, samples, both, seconds=_TRIAL_S)
        if timing is None or timing.verdict != "faster":
            return tuple(settings)
        return (*settings, *(replace(one, ratio=timing.ratio) for one in for_speed))

    def time(
        self,
        before: ModelLike,
        after: ModelLike,
        samples: Sequence[Feeds],
        config: Mapping[str, str],
        *,
        seconds: float = 10.0,
    ) -> Timing | None:
        """Time two models on the target's provider; None, with a note, where that cannot be."""
        try:
            return bench(
                before,
                after,
                provider=self.target.provider,
                feeds=samples[:_TIMED],
                seed=self.seed,
                seconds=seconds,
                session_config=config,
                progress=lambda share: self.progress("measuring the speed", share),
            )
        except (ProviderError, UnsupportedModelError) as error:
            self.notes.append(f"speed not measured: {error}")
            return None


def _listed(settings: Sequence[Setting]) -> str:
    return ", ".join(map(str, settings))
