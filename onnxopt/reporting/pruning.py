"""The report of one `prune`: what went, what that saves and what it does not, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onnxopt.claims import spelling
from onnxopt.reporting.report import Size, WithSettings

if TYPE_CHECKING:
    from onnxopt.benchmarking import Timing
    from onnxopt.benchmarking.settings import Setting
    from onnxopt.pruning.search import Searched
    from onnxopt.pruning.weights import LayerSparsity

__all__ = ["PRUNE_SCHEMA", "PruningReport"]

PRUNE_SCHEMA = "onnxopt.prune/1"


@dataclass(frozen=True)
class PruningReport(WithSettings):
    """What `prune` did.

    source: path or kind of the input. input_sha256: of its content. samples: how many passes were fitted to,
    and how many were held out to judge by. synthetic: they were made up. before, after: sizes of the input
    and of the best candidate, cleaned up. packed: bytes of both behind `pack`; None where that is not
    installed or nothing came of it. searched: the candidate, and what was tried on the way. layers: zeros by
    weight. settings: of the runtime's sessions, which the result does better with. timing: of it against the
    input; None where it was not measured. reason: why the result is the input; empty where it is the
    candidate.
    """

    source: str
    input_sha256: str
    target: str
    seed: int
    versions: Mapping[str, str]
    samples: tuple[int, int]
    synthetic: bool
    before: Size
    after: Size
    packed: tuple[int, ...] | None
    searched: Searched
    layers: tuple[LayerSparsity, ...]
    settings: tuple[Setting, ...]
    timing: Timing | None
    reason: str
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the result is a pruned model."""
        return not self.reason

    @property
    def zeros(self) -> float:
        """The share of zeros among the elements of weights."""
        return sum(one.zeros for one in self.layers) / max(sum(one.elements for one in self.layers), 1)

    @property
    def sensitivity(self) -> dict[str, float | None]:
        """Part of the model -> dB of signal over noise where it alone is pruned; None where there is none."""
        found = self.searched.sensitivity.items()
        return {name: -10 * math.log10(noise) if 0 < noise < math.inf else None for name, noise in found}

    @property
    def savings(self) -> tuple[str, ...]:
        """What each change saves and what it does not, in sentences; none where nothing came of it."""
        said: list[str] = []
        if not self.ok:
            return ()
        if isinstance(self.before.macs, int) and isinstance(self.after.macs, int) and self.before.macs:
            kept = self.after.macs / self.before.macs
            time = f"{self.timing.ratio:.2f} of the time" if self.timing else "speed not measured"
            said += [f"{kept:.0%} of the multiply-adds are left: {time}"] if kept < 1 else []
        if self.zeros >= 0.01:
            said.append(
                f"{self.zeros:.0%} of the weights are zero: for that alone no faster, as ONNX Runtime "
                "multiplies by zeros, and no smaller but in a pack"
            )
        if self.after.bytes < 0.99 * self.before.bytes:
            said.append(f"{self.after.bytes / self.before.bytes:.0%} of the bytes of tensors are left")
        if self.packed is not None:
            said.append(
                f"packed, it takes {self.packed[1] / self.packed[0]:.0%} of what the input takes packed"
            )
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has; laid out as docs/report.md says."""
        best = self.searched.best
        return {
            "schema": PRUNE_SCHEMA,
            "ok": self.ok,
            "source": self.source,
            "input_sha256": self.input_sha256,
            "target": self.target,
            "passes": [spelling(one) for one in best.passes],
            "seed": self.seed,
            "versions": dict(self.versions),
            "samples": {
                "fitted": self.samples[0],
                "held_out": self.samples[1],
                "synthetic": self.synthetic,
            },
            "before": asdict(self.before),
            "after": asdict(self.after),
            "packed": None
            if self.packed is None
            else dict(zip(("before", "after"), self.packed, strict=True)),
            "steps": [
                {
                    "name": step.name,
                    "changes": step.changes,
                    "declined": [{"reason": why, "sites": list(at)} for why, at in step.declined.items()],
                }
                for step in best.steps
            ],
            "trials": [asdict(trial) for trial in self.searched.trials],
            "sensitivity": self.sensitivity,
            "groups": [asdict(one) for one in best.cut.groups] if best.cut else [],
            "layers": [asdict(one) for one in self.layers],
            "zeros": self.zeros,
            "savings": list(self.savings),
            "judgement": best.judgement.to_dict(),
            "settings": [setting.to_dict() for setting in self.settings],
            "timing": self.timing.to_dict() if self.timing else None,
            "reason": self.reason,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
