"""The original, run once, and the comparison of as many rewrites with it as a search needs.

Both sides run at the runtime's lowest optimization level, where it changes nothing of its own. What its
levels make of the original is the noise floor: a rewrite that only re-associates floats must reach 100 dB, or
come within 6 dB of that floor. Then it runs at the runtime's default level, against the original there.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.model import ModelLike, load
from onnxopt.runtimes import Level, RunError, UnsupportedModelError, open_session, runtime_version
from onnxopt.verification.contract import Contract
from onnxopt.verification.distance import Distance, distance
from onnxopt.verification.judge import conclude, is_noise, judge, notes_on
from onnxopt.verification.reference import ReferenceSession, Runner
from onnxopt.verification.sights import look
from onnxopt.verification.verdict import Kind, OutputVerdict, Sight, Status, Verdict, margin

__all__ = ["Baseline", "verify"]

_REFERENCE = "reference"

Feeds = Mapping[str, Any]
Outputs = Mapping[str, Any]
Distances = Mapping[tuple[bool, str], Distance]
"""By whether initializers were overridden, which is judged apart, and the output's name."""


@dataclass(frozen=True)
class Sample:
    """One sample and what the original makes of it.

    `default` is None where the original does not run at that level; `overridden` says that initializers were
    replaced, to see whether they still can be.
    """

    feeds: Feeds
    lowest: Outputs
    default: Outputs | None
    overridden: bool


@dataclass(frozen=True)
class Baseline:
    """The original's side of the proof: `measure` it once, then `compare` models with it.

    `engine` is the provider, or "reference"; `obstacle` says why nothing can be shown with this original.
    """

    contract: Contract
    engine: str
    runtime: str
    samples: tuple[Sample, ...]
    floors: Distances
    sights: Mapping[str, Sight]
    notes: tuple[str, ...]
    obstacle: str

    @classmethod
    def measure(cls, before: ModelLike, feeds: Iterable[Feeds], *, provider: str = "cpu") -> Self:
        """Run the original on `feeds`, at the runtime's lowest and default levels.

        Samples on which it fails are left out and named in `notes`. Where ONNX Runtime cannot open it, ONNX's
        reference evaluator runs both sides. Raises ModelError, ProviderError, RuntimeMissingError.
        """
        model = before if isinstance(before, ir.Model) else load(before)
        contract = Contract.of(model)
        plan = [(feed, False) for feed in feeds]
        changed = _perturbed(model)
        if plan and changed:
            plan.append(({**plan[0][0], **changed}, True))
        notes: list[str] = []
        engine, runtime, obstacle = provider, f"{runtime_version()} {provider}", ""
        samples: list[Sample] = []
        random: set[str] = set()
        try:
            samples, random = _run_original(before, engine, plan, notes)
        except UnsupportedModelError as error:
            notes.append(f"{error}; both sides run on ONNX's reference evaluator")
            engine, runtime = _REFERENCE, f"onnx.reference {onnx.__version__}"
            try:
                samples, random = _run_original(before, engine, plan, notes)
            except UnsupportedModelError as second:
                obstacle = f"no runtime opens the original: {error}; {second}"
        if not samples and not obstacle:
            obstacle = f"the original ran on no sample: {notes[-1]}" if plan else "there is no sample to run"
        floors = _floors(samples)
        sights = look(samples, contract, random) if samples else {}
        notes += _remarks(samples, contract, floors, sights)
        return cls(contract, engine, runtime, tuple(samples), floors, sights, tuple(notes), obstacle)

    def compare(self, after: ModelLike, *, kind: Kind = "reorder", frozen: bool = False) -> Verdict:
        """Hold `after` against the original by the promise of `kind`; the original is not run again.

        `frozen` allows overridable initializers to be gone. An `after` that does not open or run is a
        failed claim. Raises UsageError, ModelError (a file that is no model), ProviderError.
        """
        if kind not in get_args(Kind):
            raise UsageError(f"unknown kind {kind!r}" + did_you_mean(kind, get_args(Kind)))
        contract = Contract.of(after if isinstance(after, ir.Model) else load(after))
        broken = self.contract.broken_by(contract, frozen=frozen)
        if broken:
            return self._verdict("failed", kind, "; ".join(broken))
        if self.obstacle:
            return self._verdict("unproved", kind, self.obstacle)
        kept = {port.name for port in contract.overridable}
        lost = {port.name for port in self.contract.overridable if port.name not in kept}
        samples = [sample for sample in self.samples if not lost & sample.feeds.keys()]
        if not samples:
            return self._verdict("unproved", kind, "every sample overrides an initializer that is fixed now")
        try:
            lowest = self._distances(after, "none", samples)
            default = self._distances(after, "all", samples) if self.engine != _REFERENCE else {}
        except (UnsupportedModelError, RunError) as error:
            return self._verdict("failed", kind, f"the result does not run: {error}", samples=samples)
        outputs = tuple(self._judge(port.name, kind, lowest, default) for port in self.contract.outputs)
        status, reason = conclude(kind, outputs)
        return self._verdict(status, kind, reason, outputs, samples)

    def _distances(self, after: ModelLike, level: Level, samples: Sequence[Sample]) -> Distances:
        found: dict[tuple[bool, str], Distance] = defaultdict(Distance)
        with contextlib.closing(_open(after, self.engine, level)) as runner:
            for sample in samples:
                expected = sample.lowest if level == "none" else sample.default
                if expected is None:
                    continue
                got = runner.run(sample.feeds)
                for name, value in expected.items():
                    found[sample.overridden, name].add(value, got[name])
        return dict(found)

    def _judge(self, name: str, kind: Kind, lowest: Distances, default: Distances) -> OutputVerdict:
        """The worse of the plain samples and those with overridden initializers."""
        strict = kind == "exact" or (kind == "reorder" and self.contract.quantized)
        found = []
        for key in ((False, name), (True, name)):
            if key in lowest:
                floor, low, high = self.floors[key], lowest[key], default.get(key)
                verdict = judge(name, self.sights[name], kind, strict, floor, low, high)
                where = " with initializers overridden" if key[0] and verdict.reason else ""
                found.append(replace(verdict, reason=verdict.reason + where))
        return min(found, key=margin)

    def _verdict(
        self,
        status: Status,
        kind: Kind,
        reason: str,
        outputs: tuple[OutputVerdict, ...] = (),
        samples: Sequence[Sample] = (),
    ) -> Verdict:
        notes = [*self.notes, *notes_on(outputs)]
        if self.contract.quantized and kind == "reorder":
            notes.append(
                "activations are quantized, and one flipped rounding spreads: bit-equality is required"
            )
        if any(sample.overridden for sample in samples):
            notes.append("one sample overrides the initializers that may be overridden")
        shapes = {tuple((name, np.shape(value)) for name, value in sorted(s.feeds.items())) for s in samples}
        return Verdict(status, kind, reason, outputs, self.runtime, len(samples), len(shapes), tuple(notes))


def verify(
    before: ModelLike,
    after: ModelLike,
    *,
    feeds: Iterable[Feeds] | None = None,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    kind: Kind = "reorder",
    provider: str = "cpu",
    frozen: bool = False,
) -> Verdict:
    """Prove that `after` computes what `before` does, within the promise of `kind`.

    `feeds` are complete samples (graph input name -> array); without them samples are synthesized from the
    graph with `seed` and, for dynamic inputs, `shapes`. Raises UsageError, ModelError, ProviderError,
    RuntimeMissingError; a claim that does not hold is a Verdict, not an error.
    """
    before, after = _reusable(before), _reusable(after)
    if feeds is None:
        from onnxopt.data import synthesize

        feeds = synthesize(before, seed=seed, shapes=shapes)
    return Baseline.measure(before, feeds, provider=provider).compare(after, kind=kind, frozen=frozen)


def _reusable(model: ModelLike) -> ModelLike:
    """A file object can be read once only: its bytes stand for it."""
    if isinstance(model, str | bytes | onnx.ModelProto | ir.Model) or not hasattr(model, "read"):
        return model
    return bytes(model.read())


def _open(model: ModelLike, engine: str, level: Level) -> Runner:
    if engine == _REFERENCE:
        return ReferenceSession(model)
    return open_session(model, provider=engine, level=level)


def _run_original(
    before: ModelLike, engine: str, plan: Sequence[tuple[Feeds, bool]], notes: list[str]
) -> tuple[list[Sample], set[str]]:
    """The samples that the original runs on, and the outputs that differ between two runs of the first."""
    samples: list[Sample] = []
    with contextlib.closing(_open(before, engine, "none")) as runner:
        for index, (feeds, overridden) in enumerate(plan):
            try:
                samples.append(Sample(feeds, runner.run(feeds), None, overridden))
            except RunError as error:
                notes.append(f"sample {index} is left out, the original fails on it: {error}")
        again = runner.run(samples[0].feeds) if samples else {}
    random = {name for name, value in again.items() if not distance(samples[0].lowest[name], value).equal}
    if engine == _REFERENCE or not samples:
        return samples, random
    try:
        with contextlib.closing(_open(before, engine, "all")) as runner:
            return [_at_default(sample, runner) for sample in samples], random
    except (UnsupportedModelError, RunError) as error:
        notes.append(f"nothing is compared at the runtime's default level, where the original fails: {error}")
        return samples, random


def _at_default(sample: Sample, runner: Runner) -> Sample:
    """Equal outputs are held once."""
    default = runner.run(sample.feeds)
    for name, value in sample.lowest.items():
        if distance(value, default[name]).equal:
            default[name] = value
    return Sample(sample.feeds, sample.lowest, default, sample.overridden)


def _floors(samples: Iterable[Sample]) -> Distances:
    """What the runtime's default level makes of the original, against its lowest."""
    floors: dict[tuple[bool, str], Distance] = defaultdict(Distance)
    for sample in samples:
        for name, value in sample.lowest.items():
            floors[sample.overridden, name].add(value, (sample.default or sample.lowest)[name])
    return dict(floors)


def _remarks(
    samples: Sequence[Sample], contract: Contract, floors: Distances, sights: Mapping[str, Sight]
) -> list[str]:
    """What a reader of the proof should know about the original."""
    notes = [f"output {name!r} is {sight}" for name, sight in sights.items() if sight != "compared"]
    if len(samples) == 1 and contract.inputs:
        notes.append("one sample only: an output that ignores its inputs goes unseen")
    for (overridden, name), floor in floors.items():
        if floor.odd and not overridden:
            notes.append(f"output {name!r}: NaN or infinity in {floor.odd} elements of the original")
        if not is_noise(floor) and sights[name] != "random":
            notes.append(
                f"output {name!r}: the runtime's default level computes something else than its lowest "
                f"({floor.mismatch:.0%} of the elements differ), so nothing is compared at the default level"
            )
    return notes


def _perturbed(model: ir.Model) -> dict[str, np.ndarray]:
    """Float initializers that may be overridden, each a little off its default."""
    changed = {}
    for value in model.graph.inputs:
        tensor = value.const_value if value.is_initializer() else None
        if value.name and tensor is not None and tensor.dtype.is_floating_point():
            array = tensor.numpy()
            changed[value.name] = (array.astype(np.float64) * 1.01 + 0.01).astype(array.dtype)
    return changed
