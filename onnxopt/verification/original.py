"""The original, run on all samples at the runtime's lowest and default levels, and how much it rounds."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from onnxopt.runtimes import Level, RunError, UnsupportedModelError
from onnxopt.verification.distance import Distance, any_signal, distance, is_finite
from onnxopt.verification.judge import Noise
from onnxopt.verification.probes import Feeds, Group, Probe, nudged
from onnxopt.verification.reference import Runner

__all__ = ["Key", "Noises", "Outputs", "Run", "Sample", "run_original"]

Outputs = Mapping[str, Any]
Key = tuple[Group, str]
"""A group of samples and an output's name."""
Noises = Mapping[Key, Noise]


@dataclass(frozen=True)
class Sample:
    """One sample and what the original makes of it; `default` is None where it does not run at that level."""

    feeds: Feeds
    group: Group
    lowest: Outputs
    default: Outputs | None = None


@dataclass
class Run:
    """What came of running the original.

    `nudges` is how far its outputs go when floats of its inputs move by a rounding; `random` are outputs that
    differ between two runs of one sample.
    """

    samples: list[Sample] = field(default_factory=list)
    nudges: dict[Key, Distance] = field(default_factory=lambda: defaultdict(Distance))
    random: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def noises(self) -> Noises:
        """What rounding makes of each output."""
        levels: dict[Key, Distance] = defaultdict(Distance)
        for sample in self.samples:
            for name, value in sample.lowest.items():
                levels[sample.group, name].add(value, (sample.default or sample.lowest)[name])
        return {key: Noise(found, self.nudges[key]) for key, found in levels.items()}


def run_original(open_level: Callable[[Level], Runner], plan: Iterable[Probe], *, levels: bool) -> Run:
    """Run each sample of `plan` that the original takes; the others are named in the notes.

    `levels`: the runner has optimization levels. Raises UnsupportedModelError where the lowest cannot open.
    """
    done = Run()
    with contextlib.closing(open_level("none")) as runner:
        for probe in plan:
            _try(probe, runner, done)
        if done.samples:
            first = done.samples[0]
            again = runner.run(first.feeds)
            done.random = {n for n, value in first.lowest.items() if not distance(value, again[n]).equal}
    if not levels or not done.samples:
        return done
    try:
        with contextlib.closing(open_level("all")) as runner:
            done.samples = [_at_default(sample, runner) for sample in done.samples]
    except (UnsupportedModelError, RunError) as error:
        done.notes.append(
            f"nothing is compared at the runtime's default level, where the original fails: {error}"
        )
    return done


def _try(probe: Probe, runner: Runner, done: Run) -> None:
    try:
        lowest: Outputs = runner.run(probe.feeds)
    except RunError as error:
        if probe.group != "large":
            done.notes.append(f"{probe.name} is left out, the original fails on it: {error}")
        return
    if probe.group == "large":
        # Where sums overflow, another order of them may overflow elsewhere; zeros may be what underflowed.
        lowest = {n: value for n, value in lowest.items() if is_finite(value) and any_signal(value)}
        if not lowest:
            return
    done.samples.append(Sample(probe.feeds, probe.group, lowest))
    try:
        moved: Outputs = runner.run(nudged(probe.feeds))
    except RunError:
        moved = lowest  # a rounding that the original does not bear says nothing about its noise
    for name, value in lowest.items():
        done.nudges[probe.group, name].add(value, moved[name])


def _at_default(sample: Sample, runner: Runner) -> Sample:
    """Equal outputs are held once."""
    try:
        values = runner.run(sample.feeds)
    except RunError:
        if sample.group == "large":
            return sample
        raise
    default = {}
    for name, value in sample.lowest.items():
        default[name] = value if distance(value, values[name]).equal else values[name]
    return replace(sample, default=default)
