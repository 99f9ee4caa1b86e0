"""The loop: repeats of fresh sessions, rounds of samples in random order."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.benchmarking.runner import Run, runs
from onnxopt.benchmarking.timing import Clock
from onnxopt.runtimes import Session

__all__ = [
    "LEAST",
    "Clocks",
    "Opener",
    "Pilot",
    "Plan",
    "Protocol",
    "Samples",
    "clocks",
    "measure",
    "pilot",
    "plan",
]

Opener = Callable[[], Session]
Feeds = Sequence[Mapping[str, Any]]
Array = npt.NDArray[np.float64]

LEAST = 3
"""Repeats, and rounds in a repeat, below which samples are called few."""

_SUBJECTS = 3
_SLOTS = 20
"""Repeats that share the seconds: many, since fresh sessions differ more than further rounds would settle."""
_WARM_UPS = 3
"""Memory is planned and touched in the first runs, which take up to four times a steady one."""
_OVERTIME = 3
"""How many times the seconds may pass on the wall, where the model is slow or the machine busy."""
_SLOW_S = 1.0
"""A run this long is warm after one run."""
_CACHED_S = 0.1
"""A run this long does not care what the caches held before it."""


@dataclass(frozen=True)
class Clocks:
    """What a sample reads: CPU and wall nanoseconds, and which of the two decides."""

    cpu: Callable[[], int]
    resolution_s: float
    decides: Clock

    @property
    def sample_s(self) -> float:
        """The length of a sample: CPU clocks are coarse below 1 ms, and tick at 64 Hz on some systems."""
        return max(0.005, 20 * self.resolution_s)

    def seconds(self) -> float:
        """The clock that decides, now."""
        return self.cpu() / 1e9 if self.decides == "CPU time" else time.perf_counter()


def clocks(*, one_thread: bool) -> Clocks:
    """The clocks for one thread on the CPU, or for anything else.

    A thread's CPU time sees neither other threads nor a device: for these wall time decides, and the CPU time
    is that of the whole process.
    """
    if one_thread:
        return Clocks(time.thread_time_ns, time.get_clock_info("thread_time").resolution, "CPU time")
    return Clocks(time.process_time_ns, time.get_clock_info("process_time").resolution, "wall time")


@dataclass(frozen=True)
class Pilot:
    """A first look at one model."""

    build_s: float
    """Wall time to create the session and run each sample: TensorRT builds its engine in it."""
    open_s: float
    """To create the session, on the clock that decides."""
    run_s: float
    """Wall time of a steady run: CPU clocks may be too coarse for one."""
    assignment: Mapping[str, int]
    """Nodes by execution provider."""


@dataclass(frozen=True)
class Plan:
    """How many of each thing."""

    warm_ups: int
    refill: bool
    """Whether a discarded run precedes each sample, so that the caches hold this model and not another."""
    batch: int
    """Runs in a sample, the same for all, so that each has the same share of whatever a sample costs."""
    rounds: int


@dataclass(frozen=True)
class Protocol:
    """The rules of a measurement."""

    clocks: Clocks
    plan: Plan
    seconds: float
    seed: int
    together: bool
    """All sessions open and interleaved; else one after the other, for models that fill the memory."""
    progress: Callable[[float], None] | None


@dataclass(frozen=True)
class Samples:
    """Nanoseconds; subjects are before, control and after."""

    runs: Array
    """Of one run: (repeats, rounds, subjects, 2 clocks: CPU, wall)."""
    opens: Array
    """CPU time of the process to create a session: (repeats, subjects)."""


def pilot(opener: Opener, feeds: Feeds, clocks: Clocks) -> Pilot:
    """Open a model and run it a few times; an error of the model or its feeds is raised here."""
    begin, work = time.perf_counter(), clocks.seconds()
    with opener() as session:
        open_s = clocks.seconds() - work
        assignment = dict(session.assignment)
        for sample in feeds:
            session.run(sample)
        build_s = time.perf_counter() - begin
        run = runs(session, feeds)[0]
        run_s = _timed(run)
        if run_s < _SLOW_S:
            run_s = min(_timed(run) for _ in range(_WARM_UPS))
    return Pilot(build_s, open_s, run_s, assignment)


def plan(pilots: Sequence[Pilot], clocks: Clocks, seconds: float) -> Plan:
    """Share `seconds` into repeats: short ones, but with as much sampling in them as set-up."""
    fastest, mean = min(p.run_s for p in pilots), sum(p.run_s for p in pilots) / len(pilots)
    opening = sum(p.open_s for p in pilots) / len(pilots)
    warm_ups = 1 if fastest >= _SLOW_S else _WARM_UPS
    refill = fastest < _CACHED_S
    batch = max(1, math.ceil(clocks.sample_s / max(fastest, 1e-6)))
    round_s = _SUBJECTS * (batch + refill) * mean
    setup_s = _SUBJECTS * (opening + warm_ups * mean)
    sampling_s = max(seconds / _SLOTS - setup_s, min(setup_s, seconds / (2 * LEAST)))
    return Plan(warm_ups, refill, batch, max(LEAST, math.ceil(sampling_s / round_s)))


def measure(openers: Sequence[Opener], feeds: Feeds, protocol: Protocol) -> Samples:
    """Sample before, control and after, in sessions created afresh for each repeat.

    Repeats go on until the seconds are over on the clock that decides, so that a busy machine gives as many
    samples as a quiet one, and there are 3; but not beyond three times the seconds on the wall.
    """
    clocks, wall_s = protocol.clocks, _OVERTIME * protocol.seconds
    begin, work = time.perf_counter(), clocks.seconds()
    rng = random.Random(protocol.seed)
    repeats: list[tuple[Array, Array]] = []
    done = 0.0
    while done < 1:
        repeats.append(_repeat(openers, feeds, protocol, rng))
        worked = min((clocks.seconds() - work) / protocol.seconds, len(repeats) / LEAST)
        done = min(1.0, max(worked, (time.perf_counter() - begin) / wall_s))
        if protocol.progress is not None:
            protocol.progress(done)
    samples, opens = zip(*repeats, strict=True)
    return Samples(np.stack(samples), np.stack(opens))


def _repeat(
    openers: Sequence[Opener], feeds: Feeds, protocol: Protocol, rng: random.Random
) -> tuple[Array, Array]:
    """(rounds, subjects, clocks) and (subjects,) nanoseconds of one set of sessions."""
    samples = np.empty((protocol.plan.rounds, _SUBJECTS, 2))
    opens = np.empty(_SUBJECTS)
    order = rng.sample(range(_SUBJECTS), _SUBJECTS)
    first = rng.randrange(len(feeds))
    for group in [order] if protocol.together else [[subject] for subject in order]:
        with contextlib.ExitStack() as stack:
            ready: dict[int, list[Run]] = {}
            for subject in group:
                start = time.process_time_ns()
                session = stack.enter_context(openers[subject]())
                opens[subject] = time.process_time_ns() - start
                ready[subject] = runs(session, feeds)
            _sample_rounds(ready, first, protocol, rng, samples)
    return samples, opens


def _sample_rounds(
    ready: Mapping[int, list[Run]], first: int, protocol: Protocol, rng: random.Random, samples: Array
) -> None:
    """Warm the sessions up and fill their columns of `samples`; a round gives all of them the same feeds."""
    plan, subjects = protocol.plan, list(ready)
    for subject in subjects:
        for _ in range(plan.warm_ups):
            ready[subject][first]()
    with _no_collector():
        for turn in range(plan.rounds):
            rng.shuffle(subjects)
            for subject in subjects:
                run = ready[subject][(first + turn) % len(ready[subject])]
                if plan.refill:
                    run()
                samples[turn, subject] = _sample(run, plan.batch, protocol.clocks)


def _sample(run: Run, batch: int, clocks: Clocks) -> tuple[float, float]:
    """CPU and wall nanoseconds a run; never 0, for their logarithms."""
    cpu, wall = clocks.cpu(), time.perf_counter_ns()
    for _ in range(batch):
        run()
    cpu, wall = clocks.cpu() - cpu, time.perf_counter_ns() - wall
    return max(cpu, 1) / batch, max(wall, 1) / batch


def _timed(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector stands still within the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
