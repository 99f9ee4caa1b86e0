"""What came of a quantizer on a model, and the tables that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from benchmarks.rewrite import row, table

__all__ = ["ORIGINAL", "OURS", "Outcome", "executed", "operators", "show", "summarize"]

ORIGINAL, OURS = "float32", "onnxopt"
INTEGER = {
    *("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "MatMulNBits"),
}
FLOAT = {
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"),
    *("LSTM", "GRU", "RNN", "Attention", "MultiHeadAttention", "Einsum"),
}
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class Outcome:
    """What came of one tool on one model.

    fault: why there is no model, or none that runs. seconds, peak: of the process that made it; MB.
    stored, kernels: operator -> nodes, in the file and in the graph that the runtime executes.
    timing: `onnxopt.Timing.to_dict()`; None before it is measured.
    """

    tool: str
    model: str
    metric: str
    fault: str = ""
    prepared: str = ""
    seconds: float = 0.0
    peak: float = 0.0
    size: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    score: float | None = None
    timing: dict[str, Any] | None = None

    def count(self, operators: Iterable[str]) -> int:
        """Nodes of these operators in the graph that the runtime executes."""
        return sum(self.kernels.get(operator, 0) for operator in operators)

    @property
    def ratio(self) -> float | None:
        return None if self.timing is None else float(self.timing["cpu"]["ratio"]["value"])

    @property
    def verdict(self) -> str:
        return "" if self.timing is None else str(self.timing["verdict"])

    @property
    def remark(self) -> str:
        if self.fault:
            return self.fault
        quantized = self.tool == ORIGINAL or (INTEGER | CONVERSIONS) & self.stored.keys()
        return "" if quantized else "quantized nothing"


def budget(metric: str, original: float) -> float:
    """The lowest score that keeps the budget."""
    if "agreement" in metric:
        return 0.95
    return original * (1 - 0.005) if "dB" in metric else original - 0.005


def keeps(outcome: Outcome, original: Outcome) -> bool:
    """Whether there is a quantized model within the budget."""
    if outcome.score is None or original.score is None or outcome.remark:
        return False
    return outcome.score >= budget(original.metric, original.score) - 1e-9


def operators(path: Path) -> dict[str, int]:
    """Nodes of a file by operator, those of subgraphs included."""
    graphs, found = [onnx.load(path, load_external_data=False).graph], Counter[str]()
    for graph in graphs:
        found.update(node.op_type for node in graph.node)
        graphs += [attr.g for node in graph.node for attr in node.attribute if attr.HasField("g")]
    return dict(sorted(found.items()))


def executed(path: Path, scratch: Path) -> dict[str, int]:
    """Nodes by operator in the graph that ONNX Runtime executes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(scratch), 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = operators(scratch)
    scratch.unlink()
    return found


def figure(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def show(outcomes: Sequence[Outcome]) -> None:
    """The table of one model."""
    original = outcomes[0]
    linear = sum(original.stored.get(operator, 0) for operator in FLOAT)
    print(f"\n### {original.model}: {original.metric}\n")
    columns = "tool,score,budget,CPU time / float32,A/A,integer kernels,float,Q/DQ,MB,peak MB,s,remark"
    table(columns.split(","))
    for found in outcomes:
        timing = found.timing and found.timing["cpu"]
        judged = found.tool != ORIGINAL and found.score is not None and not found.remark
        cells = [
            found.tool,
            "" if found.score is None else f"{found.score:.4f}",
            ("kept" if keeps(found, original) else "missed") if judged else "",
            figure(timing["ratio"]) if timing else "",
            figure(timing["control"]) if timing else "",
            f"{found.count(INTEGER)} of {linear}" if judged else "",
            str(found.count(FLOAT)) if found.kernels else "",
            str(found.count(CONVERSIONS)) if judged else "",
            f"{found.size / 1e6:.2f}" if found.size else "",
            f"{found.peak:.0f}" if found.peak else "",
            f"{found.seconds:.1f}" if found.seconds else "",
            found.remark,
        ]
        row(cells)


def fastest(outcomes: Iterable[Outcome]) -> str:
    """The fastest of some outcomes in words: tool, ratio, score."""
    timed = [found for found in outcomes if found.ratio is not None]
    if not timed:
        return "none"
    best = min(timed, key=lambda found: found.ratio or 0.0)
    return f"{best.tool} {best.ratio:.3f} ({best.score:.4f})"


def summarize(models: Sequence[Sequence[Outcome]], tools: Sequence[str]) -> None:
    """One row a model, then one a tool."""
    print("\n### Fastest results: CPU time / float32 (score)\n")
    table(["model", "float32 score", "onnxopt", "fastest peer that keeps the budget", "fastest peer"])
    for original, *found in models:
        peers = [outcome for outcome in found if outcome.tool != OURS and not outcome.remark]
        ours = [outcome for outcome in found if outcome.tool == OURS]
        within = fastest(outcome for outcome in peers if keeps(outcome, original))
        own = next((one.remark for one in ours if one.remark), "") or fastest(ours)
        row([original.model, f"{original.score or 0:.4f}", own, within, fastest(peers)])
    print("\n### Tools\n")
    table(["tool", "keeps the budget", "and is faster", "slower than float", "quantized nothing", "failed"])
    for tool in tools:
        pairs = [(outcome, own[0]) for own in models for outcome in own if outcome.tool == tool]
        kept = [outcome for outcome, original in pairs if keeps(outcome, original)]
        faster = sum(outcome.verdict == "faster" for outcome in kept)
        slower = sum(outcome.verdict == "slower" for outcome, _ in pairs)
        nothing = sum(outcome.remark == "quantized nothing" for outcome, _ in pairs)
        failed = sum(bool(outcome.fault) for outcome, _ in pairs)
        counts = (faster, slower, nothing, failed)
        row([tool, f"{len(kept)} of {len(pairs)}", *map(str, counts)])
