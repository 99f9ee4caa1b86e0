"""The report of one `quantize`: what became integers, what stayed and why, what it costs and gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from onnxopt.quantization.fusion import is_integer
from onnxopt.quantization.planfile import PLAN_SCHEMA, range_of
from onnxopt.quantization.sensitivity import Source
from onnxopt.reporting.report import Size, WithSettings

if TYPE_CHECKING:
    from onnxopt.benchmarking import Timing
    from onnxopt.benchmarking.settings import Setting
    from onnxopt.inspection.lints import Finding
    from onnxopt.pipeline import Step
    from onnxopt.quantization.finish import Finished
    from onnxopt.quantization.judge import Judgement
    from onnxopt.quantization.plan import Plan
    from onnxopt.quantization.static import Static

__all__ = ["QUANTIZE_SCHEMA", "QuantizationReport", "UnitLine"]

QUANTIZE_SCHEMA = "onnxopt.quantize/1"


@dataclass(frozen=True)
class UnitLine:
    """A node that could be quantized, and whether it is.

    weight_db, output_db: signal over the noise that quantizing either alone makes; None: not measured.
    """

    site: str
    op_type: str
    integer: bool
    weight_db: float | None
    output_db: float | None
    why: str


@dataclass(frozen=True)
class QuantizationReport(WithSettings):
    """What `quantize` did.

    source: path or kind of the input. input_sha256: of its content. samples: how many to calibrate on, and
    how many were held out. synthetic: they were made up. before, after: sizes of the input and of the best
    candidate. steps: of the preparation. static: what static quantization found; None for other schemes.
    finished: what was tried on top of it. left: reason -> heavy nodes that could not be quantized. kernels:
    what the runtime executes, by operator. judgement: of the best candidate. settings: of the runtime's
    sessions, which it does better with; judgement and timing are with them. timing: of it against the input;
    None where it was not measured. findings: what the target's lint says of the candidate. reason: why the
    result is the input; empty where it is the candidate.
    """

    source: str
    input_sha256: str
    target: str
    scheme: str
    goal: str
    seed: int
    versions: Mapping[str, str]
    samples: tuple[int, int]
    synthetic: bool
    before: Size
    after: Size
    steps: tuple[Step, ...]
    static: Static | None
    finished: Finished
    left: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, int]
    judgement: Judgement | None
    settings: tuple[Setting, ...]
    timing: Timing | None
    findings: tuple[Finding, ...]
    reason: str
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the result is a quantized model."""
        return not self.reason

    @property
    def integer_kernels(self) -> int:
        """How many of the executed operators compute with integers."""
        return sum(count for name, count in self.kernels.items() if is_integer(name))

    @property
    def units(self) -> tuple[UnitLine, ...]:
        """Every node that could be quantized, the one that costs most accuracy first."""
        chosen = self._chosen
        if self.static is None or chosen is None:
            return ()
        static, lines = self.static, []
        why = dict.fromkeys(static.searched.unfused, "the runtime does not fuse it")
        why |= dict.fromkeys(static.kept, "asked for")
        why |= {site: f"by {name}" for site, name in self.finished.rewritten.items()}
        why |= dict.fromkeys(chosen.nodes, "")
        for unit in static.surveyed.units:
            site = unit.site
            weight, output = (
                static.noise.known.get(source)
                for source in (Source("weight", site), Source("tensor", unit.output.name or ""))
            )
            integer = site in chosen.nodes or site in self.finished.rewritten
            reason = why.get(site, "costs more than it gains")
            line = UnitLine(site, unit.node.op_type, integer, _db(weight), _db(output), reason)
            lines.append(((weight or 0.0) + (output or 0.0), line))
        return tuple(line for _, line in sorted(lines, key=lambda pair: -pair[0]))

    @property
    def plan(self) -> dict[str, Any] | None:
        """The choice and the ranges, as `quantize` takes them again; None for schemes that have none."""
        chosen = self._chosen
        if self.static is None or chosen is None:
            return None
        outputs = {unit.site: unit.output.name or "" for unit in self.static.surveyed.units}
        nodes = [
            {
                "site": line.site,
                "op_type": line.op_type,
                "as": chosen.weight.name if line.site in chosen.nodes else "float",
                "output": chosen.params[name].format.name
                if (name := outputs[line.site]) in chosen.tensors and line.site in chosen.nodes
                else "float",
                "weight_db": line.weight_db,
                "output_db": line.output_db,
            }
            for line in self.units
        ]
        return {
            "schema": PLAN_SCHEMA,
            "model": self.input_sha256,
            "keepers": list(self.static.keepers),
            "nodes": nodes,
            "ranges": {name: list(range_of(params)) for name, params in chosen.params.items()},
        }

    @property
    def _chosen(self) -> Plan | None:
        """The plan of the candidate that the figures are about; None of other schemes."""
        if self.static is None:
            return None
        static, judged = self.static, self.finished.judgement is not None
        candidate = static.searched.best if judged else static.searched.nearest
        if candidate is None or (judged and not self.finished.static):
            return replace(static.plan, nodes=frozenset(), tensors=frozenset())
        return candidate.plan

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has; laid out as docs/report.md says."""
        searched = self.static.searched if self.static else None
        return {
            "schema": QUANTIZE_SCHEMA,
            "ok": self.ok,
            "source": self.source,
            "input_sha256": self.input_sha256,
            "target": self.target,
            "scheme": self.scheme,
            "for": self.goal,
            "seed": self.seed,
            "versions": dict(self.versions),
            "samples": {
                "calibration": self.samples[0],
                "held_out": self.samples[1],
                "synthetic": self.synthetic,
            },
            "before": asdict(self.before),
            "after": asdict(self.after),
            "preparation": {step.name: step.changes for step in self.steps if step.changes},
            "kernels": dict(self.kernels),
            "integer_kernels": self.integer_kernels,
            "unfused": list(searched.unfused) if searched else [],
            "left": [{"reason": reason, "sites": list(sites)} for reason, sites in self.left.items()],
            "units": [asdict(unit) for unit in self.units],
            "keepers": {
                name: {"before_db": _db(before), "after_db": _db(after)}
                for name, (before, after) in (self.static.keepers if self.static else {}).items()
            },
            "trials": [
                {
                    "units": trial.units,
                    "ratio": _plain(trial.ratio),
                    "noise_db": _db(trial.noise),
                    "ok": trial.judgement.ok,
                    "summary": trial.judgement.summary,
                }
                for trial in (searched.trials if searched else ())
            ],
            "finishing": [asdict(one) for one in self.finished.tried],
            "judgement": self.judgement.to_dict() if self.judgement else None,
            "settings": [setting.to_dict() for setting in self.settings],
            "timing": self.timing.to_dict() if self.timing else None,
            "lint": [finding.to_dict() for finding in self.findings],
            "reason": self.reason,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def _db(noise: float | None) -> float | None:
    """Noise as dB below the signal, None where there is none or it was not measured."""
    return None if noise is None or noise <= 0 or not math.isfinite(noise) else -10 * math.log10(noise)


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
