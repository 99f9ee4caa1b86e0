"""Compare the latency of two models."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxopt.benchmarking.machine import load_average, machine
from onnxopt.benchmarking.rounds import Opener, Protocol, Samples, clocks, measure, pilot, plan
from onnxopt.benchmarking.statistics import estimate
from onnxopt.benchmarking.timing import Figures, Timing
from onnxopt.errors import UsageError
from onnxopt.graph import tensor_bytes
from onnxopt.model import ModelLike, load
from onnxopt.runtimes import open_session, runtime_version
from onnxopt.storage import materialize

__all__ = ["bench"]

_MOST_FEEDS = 16
"""On a device each sample's inputs and outputs stay in its memory, for each session."""
_LARGE = 2**30
"""Bytes of weights from which only one session is open at a time: three copies may not fit the memory."""


def bench(
    before: ModelLike,
    after: ModelLike,
    *,
    provider: str = "cpu",
    feeds: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    seconds: float = 10.0,
    session_config: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[float], None] | None = None,
) -> Timing:
    """Time `after` against `before`, and `before` against itself, side by side on `provider`.

    Three sessions (before, a second one of before as the control, after) take samples in rounds, in random
    order, and are created afresh for each repeat. A round's ratios are paired: whatever else the machine did
    then, it did to all three. A sample is as many runs as last 5 ms, after one that is discarded. What is
    reported are medians of the paired ratios with 95 % bootstrap intervals; `Timing.blind_zone` is the rule
    of the verdict. Within one process measure one pair at a time.

    On the CPU a run includes the hand-over of numpy arrays; on a device inputs and outputs stay there, and a
    run ends when the device has finished. Weights above 1 GiB: one session at a time, so that pairs are less
    close. Sessions are sequential, at the runtime's default optimization level, and do not spin.

    `feeds` are used in turn, at most the first 16; None: synthesized from the graph with `seed` and `shapes`.
    `seconds` counts on the clock that decides, so that a busy machine gives as many samples as a quiet one;
    there, and for slow models, up to three times as long pass on the wall. A first look at each model comes
    on top. `session_config`: settings of the sessions of `after` alone. `progress` gets the fraction done
    after each repeat.

    Raises:
        UsageError: no feeds, seconds or threads; an input that cannot be bound on a device.
        ProviderError: the provider cannot run here, or took no node.
        ModelError, RunError, RuntimeMissingError: as from `open_session` and `Session.run`.
    """
    if seconds <= 0 or threads < 1:
        raise UsageError(f"bench: {seconds} seconds on {threads} threads: both must be positive")
    load_before = load_average()
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(materialize(model)) for model in (before, after)]
        if feeds is None:
            from onnxopt.data import synthesize

            feeds = synthesize(sources[0], seed=seed, shapes=shapes, samples=1)
        samples = list(feeds)[:_MOST_FEEDS]
        if not samples:
            raise UsageError("bench: feeds are empty: give at least one sample, or None to synthesize it")
        settings: Sequence[Mapping[str, str]] = ({}, session_config)
        openers = [
            _opener(source, provider, threads, config, stack)
            for source, config in zip(sources, settings, strict=True)
        ]
        clock = clocks(one_thread=provider == "cpu" and threads == 1)
        pilots = [pilot(opener, samples, clock) for opener in openers]
        together = max(tensor_bytes(load(source)) for source in sources) < _LARGE
        protocol = Protocol(clock, plan(pilots, clock, seconds), seconds, seed, together, progress)
        measured = measure((openers[0], *openers), samples, protocol)
    cpu, wall = _figures(measured, seed)
    opens_ms = np.median(measured.opens, axis=0) / 1e6
    builds = [p.build_s if provider == "tensorrt" else None for p in pilots]
    here = machine()
    return Timing(
        provider=provider,
        threads=threads,
        clock=clock.decides,
        cpu=cpu,
        wall=wall,
        open_before_ms=float(opens_ms[0]),
        open_after_ms=float(opens_ms[2]),
        build_before_s=builds[0],
        build_after_s=builds[1],
        repeats=len(measured.runs),
        rounds=protocol.plan.rounds,
        batch=protocol.plan.batch,
        seed=seed,
        session_config=dict(session_config),
        runtime=runtime_version(),
        machine=here.cpu,
        cores=here.cores,
        assignment_before=pilots[0].assignment,
        assignment_after=pilots[1].assignment,
        load_average=(load_before, load_average()),
    )


def _figures(samples: Samples, seed: int) -> tuple[Figures, Figures]:
    """What the CPU clock read, and what the wall clock read."""
    before, control, after = np.moveaxis(np.log(samples.runs / 1e6), 2, 0)
    columns = np.stack([after - before, control - before, before, after], axis=-1)
    repeats, rounds, clocks_, figures = columns.shape
    found = estimate(columns.reshape(repeats, rounds, clocks_ * figures), seed=seed)
    return Figures(*found[:figures]), Figures(*found[figures:])


def _opener(
    source: ModelLike,
    provider: str,
    threads: int,
    session_config: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Opener:
    return functools.partial(
        open_session,
        source,
        provider=provider,
        threads=threads,
        session_config=session_config,
        provider_options=_provider_options(provider, stack),
    )


def _provider_options(provider: str, stack: contextlib.ExitStack) -> dict[str, str]:
    """What users run by default (TF32 on CUDA); TensorRT's engine is built once and kept for all repeats."""
    if provider == "cuda":
        return {"use_tf32": "1"}
    if provider != "tensorrt":
        return {}
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxopt-engine-"))
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
