"""What the steps of one `quantize` share, and what each hands on to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.benchmarking import Timing
from onnxopt.benchmarking.settings import Setting
from onnxopt.data import Feeds
from onnxopt.inspection.lints import Finding
from onnxopt.job import Job
from onnxopt.pipeline import Outcome
from onnxopt.quantization.finish import Finished
from onnxopt.quantization.judge import Judge, Judgement
from onnxopt.quantization.schemes import Scheme
from onnxopt.quantization.static import Goal, Settings, Static
from onnxopt.quantization.units import Survey
from onnxopt.targets import Target

__all__ = ["Candidate", "Proved", "Work"]


@dataclass(frozen=True)
class Work:
    """What is asked for, and what it is made of.

    settings: of static quantization; None of other schemes, whose passes take `options`. measure: whether
    speed is measured. samples: all of them, fitted and held out. kept: sites that stay in floating point.
    isas: instruction sets on which the budget has to be kept, too.
    """

    job: Job
    scheme: Scheme
    settings: Settings | None
    options: Mapping[str, bool]
    goal: Goal
    measure: bool
    samples: Sequence[Feeds]
    fitted: Sequence[Feeds]
    held_out: Sequence[Feeds]
    judge: Judge
    prepared: Outcome
    kept: frozenset[str]
    isas: tuple[str, ...]

    @property
    def target(self) -> Target:
        """Where the result is to run."""
        return self.job.target


@dataclass(frozen=True)
class Candidate:
    """The best that keeps the budget, or the nearest to it.

    model: None, as is the judgement, where nothing was quantized. found: by static quantization; None of
    other schemes. made: with what was tried behind it. left: reason -> nodes that could not be quantized.
    """

    model: ir.Model | None
    judgement: Judgement | None
    found: Static | Survey | None
    made: Finished
    left: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Proved:
    """What is known of a candidate, as far as it was looked at.

    reason: why it is not the result; empty where it is. findings: of the target's lint. settings: of the
    runtime's sessions, which judgement and timing are with.
    """

    judgement: Judgement | None
    reason: str
    findings: tuple[Finding, ...] = ()
    settings: tuple[Setting, ...] = ()
    timing: Timing | None = None
