"""Optimize every model of a folder through the command line, and judge the results from outside.

    python benchmarks/real_models.py MODELS [--scores SCORE.PY] [--target generic] [--peers onnxslim onnxsim]

For each model: exit code, nodes, BatchNormalization nodes that a Conv, ConvTranspose, Gemm or MatMul feeds,
seconds, the proof; then, independently of onnxopt: onnx.checker, names and types of inputs and outputs,
operator domains, the largest difference of the outputs in ONNX Runtime with its optimizations off, and, where
SCORE.PY knows the model, its score before and after. --peers adds other tools.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.peers import ENVIRONMENTS, PEERS
from benchmarks.peers import run as run_peer
from onnxopt.data import synthesize

LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def fed_batchnorms(model: onnx.ModelProto) -> int:
    """BatchNormalization nodes of the main graph whose input is the output of a linear node."""
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    return sum(
        node.op_type == "BatchNormalization" and producers.get(node.input[0]) in LINEAR
        for node in model.graph.node
    )


def count_nodes(graph: onnx.GraphProto) -> int:
    inner = (attr.g for node in graph.node for attr in node.attribute if attr.HasField("g"))
    return len(graph.node) + sum(map(count_nodes, inner))


def domains(graph: onnx.GraphProto) -> set[str]:
    found = {node.domain for node in graph.node}
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("g"):
                found |= domains(attr.g)
    return found


def signature(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """Names and element types of inputs (that are no initializers) and outputs, in order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    ports = [*(v for v in model.graph.input if v.name not in weights), *model.graph.output]
    return [(port.name, port.type.tensor_type.elem_type) for port in ports]


def run(path: Path, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def difference(before: Path, after: Path) -> str:
    """The largest difference, relative to the largest value of the output it is in."""
    feeds = synthesize(before)
    worst = 0.0
    for want, have in zip(run(before, feeds), run(after, feeds), strict=True):
        for a, b in zip(want, have, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{a.dtype}{a.shape} became {b.dtype}{b.shape}"
            if a.dtype.kind != "f":
                worst = max(worst, float(not np.array_equal(a, b)))
            elif a.size:
                worst = max(worst, float(np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(a)), 1e-30)))
    return f"{worst:.1e}"


def judge(source: Path, target: Path) -> dict[str, str]:
    """What can be said of a result without the tool that made it."""
    if not target.exists():
        return {"outside": "no file"}
    before, after = onnx.load(source), onnx.load(target)
    faults = []
    try:
        onnx.checker.check_model(str(target))
    except onnx.checker.ValidationError as error:
        faults.append(f"checker: {str(error).splitlines()[0][:60]}")
    if signature(before) != signature(after):
        faults.append("signature changed")
    if strange := domains(after.graph) - domains(before.graph) - {""}:
        faults.append(f"new domains {sorted(strange)}")
    try:
        distance = difference(source, target)
    except Exception as error:
        distance = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return {
        "nodes": f"{count_nodes(before.graph)} → {count_nodes(after.graph)}",
        "fed BN": f"{fed_batchnorms(before)} → {fed_batchnorms(after)}",
        "difference": distance,
        "outside": "; ".join(faults) or "ok",
    }


def optimize(source: Path, target: Path, options: list[str]) -> dict[str, str]:
    report = target.with_suffix(".json")
    command = [
        sys.executable,
        "-m",
        "onnxopt",
        "optimize",
        str(source),
        "-o",
        str(target),
        "--json",
        str(report),
    ]
    started = time.perf_counter()
    done = subprocess.run([*command, "--no-bench", *options], capture_output=True, text=True)
    row = {"exit": str(done.returncode), "seconds": f"{time.perf_counter() - started:.1f}"}
    if done.returncode:
        return {**row, "proof": done.stderr.strip().splitlines()[-1]}
    told = json.loads(report.read_text())
    left = f", {len(told['left_out'])} left out" if told["left_out"] else ""
    return {**row, "proof": told["verdict"]["summary"].split(",")[0] + left}


def peer(name: str, environments: Path, source: Path, target: Path) -> dict[str, str]:
    ran = run_peer(PEERS[name], environments, source, target)
    return {"exit": ran.fault or "0", "seconds": f"{ran.wall:.1f}", "proof": ""}


def load_scores(path: Path | None) -> Any:
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["score"] = module
    spec.loader.exec_module(module)
    return module


def score(scores: Any, name: str, path: Path) -> str:
    if scores is None or not path.exists():
        return ""
    try:
        evaluation = scores.load(name)
    except (KeyError, SystemExit, ValueError, AttributeError):
        return ""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return f"{evaluation.score(evaluation.run(session)):.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--freeze-initializers", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = parser.parse_args()
    scores = load_scores(args.scores)
    options = ["--target", args.target] + ["--freeze-initializers"] * args.freeze_initializers
    tools = ["onnxopt", *args.peers]
    columns = (
        "model",
        "tool",
        "exit",
        "seconds",
        "nodes",
        "fed BN",
        "difference",
        "score",
        "outside",
        "proof",
    )
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(args.models.glob("*.onnx")):
            if args.only and source.stem not in args.only:
                continue
            for tool in tools:
                target = Path(folder) / f"{source.stem}.{tool}.onnx"
                if tool == "onnxopt":
                    row = optimize(source, target, options)
                else:
                    row = peer(tool, args.environments, source, target)
                row = {"model": source.stem, "tool": tool, **row, **judge(source, target)}
                old, new = (
                    score(scores, source.stem, source) if target.exists() else "",
                    score(scores, source.stem, target),
                )
                row["score"] = f"{old} → {new}" if new else ""
                print("| " + " | ".join(row.get(column, "") for column in columns) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
