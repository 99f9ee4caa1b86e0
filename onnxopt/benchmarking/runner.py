"""One session with one sample, ready to be timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxopt.errors import UsageError
from onnxopt.runtimes import Session

__all__ = ["Run", "bound", "runs"]

Run = Callable[[], object]
"""One run of the model, finished when the call returns."""

_DEVICES = {"cuda": "cuda", "tensorrt": "cuda"}


def runs(session: Session, feeds: Sequence[Mapping[str, Any]]) -> list[Run]:
    """What to time for each sample: a plain run on the CPU, a bound one on a device."""
    if session.provider not in _DEVICES:
        return [functools.partial(session.run, sample) for sample in feeds]
    return [bound(session, sample, _DEVICES[session.provider]) for sample in feeds]


def bound(session: Session, sample: Mapping[str, Any], device: str) -> Run:
    """A run whose inputs lie on `device` already and whose outputs stay there, in memory of the first run.

    Raises:
        UsageError: an input that cannot be bound: no tensor, or of a type that numpy lacks.
    """
    binding = session.raw.io_binding()
    for info in (*session.inputs, *session.overridable):
        if info.name not in sample:
            continue
        if not info.type.startswith("tensor(") or info.dtype.kind not in "biuf":
            raise UsageError(f"bench: input {info.name!r} is {info.type}, which cannot be timed on {device}")
        binding.bind_cpu_input(info.name, np.asarray(sample[info.name], order="C"))
    for info in session.outputs:
        binding.bind_output(info.name, device)
    binding.synchronize_inputs()

    def run() -> None:
        session.raw.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run
