"""The original, run once, and the comparison of as many rewrites with it as a search needs.

Both sides run at the runtime's lowest optimization level, where it changes nothing of its own. What its
levels make of the original is the noise floor: a rewrite that only re-associates floats must reach 100 dB, or
come within 6 dB of that floor. Then it runs at the runtime's default level, against the original there.

One output may mix scales, so each slice along its last axis and its channels must reach 60 dB, or come within
20 dB of what rounding makes of that slice: a slice holds few numbers, some of which cancel. A wrong slice is
below 40 dB. Samples made from the first one show what the given ones cannot: see `probes`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Self, get_args

import numpy as np
import onnx
import onnx_ir as ir

from onnxopt.emulation import ISAS, find_isa, open_emulated
from onnxopt.errors import UsageError, did_you_mean
from onnxopt.model import ModelLike, load, reusable
from onnxopt.runtimes import Level, RunError, UnsupportedModelError, open_session, runtime_version
from onnxopt.verification.contract import Contract
from onnxopt.verification.distance import Distance
from onnxopt.verification.judge import blindness, conclude, judge, notes_on
from onnxopt.verification.original import Key, Noises, Run, Sample, run_original
from onnxopt.verification.probes import Feeds, Group, Probe, probes
from onnxopt.verification.reference import ReferenceSession, Runner
from onnxopt.verification.remarks import remarks, unseen
from onnxopt.verification.sights import look
from onnxopt.verification.verdict import Kind, OutputVerdict, Sight, Status, Verdict, margin

__all__ = ["Baseline", "verify"]

_REFERENCE = "reference"
_WHERE: Mapping[Group, str] = {
    "given": "",
    "overridden": " with initializers overridden",
    "large": " on large inputs",
}

_MOST_SAMPLES = 64


@dataclass(frozen=True)
class Baseline:
    """The original's side of the proof: `measure` it once, then `compare` models with it.

    `engine` is the provider, an emulated instruction set, or "reference"; `obstacle` says why nothing can be
    shown with this original.
    """

    contract: Contract
    engine: str
    runtime: str
    samples: tuple[Sample, ...]
    noises: Noises
    sights: Mapping[str, Sight]
    notes: tuple[str, ...]
    obstacle: str
    session_config: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        before: ModelLike,
        feeds: Iterable[Feeds],
        *,
        provider: str = "cpu",
        session_config: Mapping[str, str] | None = None,
    ) -> Self:
        """Run the original on `feeds`, the first 64 of them, at the runtime's lowest and default levels.

        `session_config` are settings of the sessions, also of those of `compare` unless it gets its own.
        `provider` may be an instruction set of `emulation.ISAS` too, and the CPU is emulated then.
        Samples on which it fails are left out and named in `notes`. Where ONNX Runtime cannot open it, ONNX's
        reference evaluator runs both sides. Raises ModelError, ProviderError, RuntimeMissingError.
        """
        model = before if isinstance(before, ir.Model) else load(before)
        contract, config = Contract.of(model), dict(session_config or {})
        plan, notes = _plan(model, feeds)
        notes += [f"sessions with {key}={value}" for key, value in config.items()]
        engine, runtime, obstacle = provider, _runtime(provider), ""
        done = Run()
        try:
            done = run_original(partial(_open, before, engine, config=config), plan, levels=True)
        except UnsupportedModelError as error:
            notes.append(f"{error}; both sides run on ONNX's reference evaluator")
            engine, runtime = _REFERENCE, f"onnx.reference {onnx.__version__}"
            try:
                done = run_original(partial(_open, before, engine, config=config), plan, levels=False)
            except UnsupportedModelError as second:
                obstacle = f"no runtime opens the original: {error}; {second}"
        notes += done.notes
        if not any(sample.group == "given" for sample in done.samples):
            why = f"the original ran on no sample: {notes[-1]}" if plan else "there is no sample to run"
            return cls(contract, engine, runtime, (), {}, {}, tuple(notes), obstacle or why, config)
        sights = look(done.samples, contract, done.random)
        noises = done.noises
        notes += remarks(done.samples, contract, noises, sights)
        notes += unseen(model, done.samples, lambda shown: _open(shown, engine, "none", config))
        return cls(contract, engine, runtime, tuple(done.samples), noises, sights, tuple(notes), "", config)

    def on(self, isa: str) -> Self:
        """The same outputs of the original, to hold models against them that run on an emulated CPU."""
        return replace(self, engine=isa, runtime=_runtime(isa))

    @property
    def unprovable(self) -> str:
        """Why nothing can be proved of any rewrite of this original; empty where something can."""
        return self.obstacle or blindness(self.sights)

    def compare(
        self,
        after: ModelLike,
        *,
        kind: Kind = "reorder",
        frozen: bool = False,
        session_config: Mapping[str, str] | None = None,
    ) -> Verdict:
        """Hold `after` against the original by the promise of `kind`; the original is not run again.

        `frozen` allows overridable initializers to be gone. `session_config`: settings of its sessions, in
        place of those of the original's. What a lossy change costs is measured at the runtime's default
        level, where quantized operators run in integers. An `after` that does not open or run is a failed
        claim. Raises UsageError, ModelError (a file that is no model), ProviderError.
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
            config = self.session_config if session_config is None else session_config
            skip = kind == "lossy" and all(sample.default for sample in samples)
            lowest = {} if skip else self._distances(after, "none", samples, config)
            default = self._distances(after, "all", samples, config) if self.engine != _REFERENCE else {}
            lowest = lowest or default
        except (UnsupportedModelError, RunError) as error:
            return self._verdict("failed", kind, f"the result does not run: {error}", samples=samples)
        outputs = tuple(self._judge(port.name, kind, lowest, default) for port in self.contract.outputs)
        status, reason = conclude(kind, outputs)
        return self._verdict(status, kind, reason, outputs, samples)

    def _distances(
        self, after: ModelLike, level: Level, samples: Sequence[Sample], config: Mapping[str, str]
    ) -> Mapping[Key, Distance]:
        found: dict[Key, Distance] = defaultdict(Distance)
        with contextlib.closing(_open(after, self.engine, level, config)) as runner:
            for sample in samples:
                expected = sample.lowest if level == "none" else sample.default
                if expected is None:
                    continue
                got = runner.run(sample.feeds)
                for name, value in expected.items():
                    found[sample.group, name].add(value, got[name])
        return dict(found)

    def _judge(
        self, name: str, kind: Kind, lowest: Mapping[Key, Distance], default: Mapping[Key, Distance]
    ) -> OutputVerdict:
        """The worst of the groups of samples; where nothing is judged, the figures of the given ones."""
        exact = kind == "exact" and not self.contract.half
        strict = exact or (kind != "lossy" and self.contract.quantized)
        found = []
        for group, where in _WHERE.items():
            key: Key = (group, name)
            if key in lowest:
                noise = self.noises[key]
                verdict = judge(
                    name,
                    self.sights[name],
                    kind,
                    strict,
                    noise,
                    lowest[key],
                    default.get(key),
                    rough=group == "large" or self.contract.half,
                    stretched=group == "large",
                    quantized=strict and self.contract.quantized,
                )
                reason = verdict.reason + where if verdict.reason else ""
                found.append(replace(verdict, reason=reason))
        failed = [verdict for verdict in found if not verdict.ok]
        return min(failed or (found[:1] if kind == "lossy" else found), key=margin)

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
        if self.contract.half and kind == "exact":
            notes.append("16-bit floats: the runtime's own Casts round them, so bit-equality is not required")
        overriding = sum(sample.group == "overridden" for sample in samples)
        if overriding:
            count = "one sample overrides" if overriding == 1 else f"{overriding} samples override"
            notes.append(f"{count} the initializers that may be overridden")
        feeds = [sample.feeds for sample in samples if sample.group != "large"]
        shapes = {tuple((name, np.shape(value)) for name, value in sorted(feed.items())) for feed in feeds}
        return Verdict(status, kind, reason, outputs, self.runtime, len(feeds), len(shapes), tuple(notes))


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
    session_config: Mapping[str, str] | None = None,
    isa: str | None = None,
) -> Verdict:
    """Prove that `after` computes what `before` does, within the promise of `kind`.

    `feeds` are complete samples (graph input name -> array); without them samples are synthesized from the
    graph with `seed` and, for dynamic inputs, `shapes`. `session_config`: settings of all sessions. `isa`,
    such as "avx2", asks for the same on an emulated CPU, where other kernels run: of a lossy change against
    what `before` computes here, of others against what it computes there, as rounding differs from CPU to
    CPU. Raises UsageError, ModelError, ProviderError, RuntimeMissingError; a claim that does not hold is a
    Verdict.
    """
    if isa and find_isa(isa) and provider != "cpu":
        raise UsageError(f"an emulated CPU ({isa}) is no {provider}: leave one of them out")
    before, after = reusable(before), reusable(after)
    if feeds is None:
        from onnxopt.data import synthesize

        feeds = synthesize(before, seed=seed, shapes=shapes)
    baseline = Baseline.measure(before, feeds, provider=provider, session_config=session_config)
    verdict = baseline.compare(after, kind=kind, frozen=frozen)
    if not isa or not verdict.ok:
        return verdict
    if kind == "lossy":
        there = baseline.on(isa)
    else:
        given = [sample.feeds for sample in baseline.samples if sample.group == "given"]
        there = Baseline.measure(before, given, provider=isa, session_config=session_config)
    return replace(verdict, emulated=there.compare(after, kind=kind, frozen=frozen))


def _runtime(engine: str) -> str:
    emulated = f", {engine} emulated ({ISAS[engine].cpu})" if engine in ISAS else ""
    return f"{runtime_version()} {'cpu' if emulated else engine}{emulated}"


def _open(model: ModelLike, engine: str, level: Level, config: Mapping[str, str]) -> Runner:
    if engine == _REFERENCE:
        return ReferenceSession(model)
    if engine in ISAS:
        return open_emulated(model, isa=engine, level=level, session_config=config)
    return open_session(model, provider=engine, level=level, session_config=config)


def _plan(model: ir.Model, feeds: Iterable[Feeds]) -> tuple[list[Probe], list[str]]:
    """The samples to run, and a note where some are left out; a sequence is read no further than needed."""
    given = list(islice(feeds, _MOST_SAMPLES + 1))
    notes = []
    if len(given) > _MOST_SAMPLES:
        count = f" of {len(feeds)}" if isinstance(feeds, Sized) else ""
        notes.append(f"the first {_MOST_SAMPLES}{count} samples were used")
        del given[_MOST_SAMPLES:]
    plan = [Probe("given", sample, f"sample {index}") for index, sample in enumerate(given)]
    return plan + (list(probes(model, given[0])) if given else []), notes
