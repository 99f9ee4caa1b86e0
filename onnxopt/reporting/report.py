"""The report of one `optimize`: what it was, what was done, what was proved and measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxopt.benchmarking.settings import Setting, session_config
from onnxopt.inspection import macs, totals

if TYPE_CHECKING:
    from onnxopt.benchmarking import Timing
    from onnxopt.benchmarking.profits import Profit
    from onnxopt.pipeline import LeftOut, Step
    from onnxopt.verification import Verdict

__all__ = ["SCHEMA", "SESSION_SCHEMA", "Report", "Size", "WithSettings", "measure_size", "session_file"]

SCHEMA = "onnxopt.optimize/1"
"""Name and version of the layout of `Report.to_dict`; a change that breaks readers raises the version."""

SESSION_SCHEMA = "onnxopt.session/1"
"""The same for `Report.session`."""


def session_file(model: str | os.PathLike[str]) -> Path:
    """Where the settings for the sessions of a model lie: `model.session.json` beside `model.onnx`."""
    return Path(model).with_suffix(".session.json")


class WithSettings:
    """A report on a model that may want settings for its sessions."""

    settings: tuple[Setting, ...]
    target: str
    versions: Mapping[str, str]

    @property
    def session(self) -> dict[str, Any]:
        """What users of the result set in its sessions, and why; laid out as docs/report.md says."""
        return {
            "schema": SESSION_SCHEMA,
            "session_config": session_config(self.settings),
            "why": [one.summary for one in self.settings],
            "target": self.target,
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class Size:
    """How large a model is: nodes and initializers of all graphs, bytes of all tensors, weights, MACs a run.

    MACs are text in the symbols of dynamic dimensions where the sizes are not given.
    """

    nodes: int
    initializers: int
    bytes: int
    parameters: int
    macs: int | str


def measure_size(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Size:
    """The size of a model; `shapes` gives dynamic inputs a size, so that MACs are a number."""
    counted = totals(model)
    return Size(counted.nodes, counted.initializers, counted.bytes, counted.parameters, macs(model, shapes))


@dataclass(frozen=True)
class Report(WithSettings):
    """What `optimize` did.

    source: path or kind of the input. passes: as a recipe spells them. steps: one for each pass.
    shapes: input sizes that MACs are counted for; empty where they are left symbolic.
    left_out: rewrites that broke a claim and were undone. left_as_it_was: the result is the input.
    profits: what was decided about guarded passes that had something to do. settings: of the runtime's
    sessions, which the result does better with; `timing` is with them.
    verdict, timing: None where nothing was verified or measured; `notes` say why. seconds: wall time.
    """

    source: str
    target: str
    passes: tuple[str, ...]
    seed: int
    versions: Mapping[str, str]
    shapes: Mapping[str, Sequence[int]]
    before: Size
    after: Size
    steps: tuple[Step, ...]
    left_out: tuple[LeftOut, ...]
    rounds: int
    left_as_it_was: bool
    profits: tuple[Profit, ...]
    settings: tuple[Setting, ...]
    verdict: Verdict | None
    timing: Timing | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether everything asked for was done and shown: what `--strict` insists on."""
        unproved = self.verdict is not None and not self.verdict.ok
        return not (self.left_out or self.left_as_it_was or unproved)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has; laid out as docs/report.md says."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "target": self.target,
            "passes": list(self.passes),
            "seed": self.seed,
            "versions": dict(self.versions),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "before": asdict(self.before),
            "after": asdict(self.after),
            "steps": [
                {
                    "name": step.name,
                    "kind": step.kind,
                    "changes": step.changes,
                    "declined": [
                        {"reason": reason, "sites": list(sites)} for reason, sites in step.declined.items()
                    ],
                    "seconds": step.seconds,
                    "nodes": step.nodes,
                    "bytes": step.bytes,
                }
                for step in self.steps
            ],
            "left_out": [{**left.rewrite._asdict(), "reason": left.reason} for left in self.left_out],
            "rounds": self.rounds,
            "left_as_it_was": self.left_as_it_was,
            "profits": [profit.to_dict() for profit in self.profits],
            "settings": [setting.to_dict() for setting in self.settings],
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "timing": self.timing.to_dict() if self.timing else None,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
