"""onnxopt's quantization beside those of other tools, in one run: score, latency, kernels, size, memory.

    python benchmarks/quantize.py --models MODELS --evals EVALS --results RESULTS [--only ...] [--tools ...]

EVALS holds a score.py whose `load(NAME)` gives `calib` (complete feeds), `run(session)`, `score(outputs)` and
`metric`; each of its `EVALS` that has a MODELS/NAME.onnx is run. Calibration is on `calib`, the score on the
test items. Every tool gets the model as the documentations ask for it (opset 13, weights as initializers,
ONNX Runtime's quant_pre_process), and without the last where it fails on that; onnxopt gets the original.
What a tool made is kept in RESULTS, and not made or measured again unless --again says so.

CPU time is that of a run on one thread, as a ratio to the original at the runtime's default level, paired;
A/A is the original to itself. Kernels are counted in the graph that ONNX Runtime saves: nodes that compute
in integers, of the linear nodes in the original; linear nodes in float; conversions between the two. A result
keeps the budget where the score falls by at most 0.005, agreement stays at 0.95 or more, and decibels fall by
at most 0.5 %. Seconds and peak memory are those of the tool's own process, imports left out of the seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import onnxopt
from benchmarks.outcomes import ORIGINAL, OURS, Outcome, executed, operators, show, summarize
from benchmarks.peers import ENVIRONMENTS, Peer, Ran, run
from benchmarks.quantizers import PREPARE, PREPROCESS, QUANTIZERS
from benchmarks.real_models import load_scores

SAMPLES = 4
"""Calibration samples that latency is measured on, in turn."""


class Bench:
    """One model with its evaluation: what the tools make of it, and how that fares."""

    def __init__(self, model: Path, scores: Any, args: argparse.Namespace) -> None:
        self.model, self.scores, self.args = model, scores, args
        self.folder: Path = args.results / model.stem
        self.folder.mkdir(parents=True, exist_ok=True)
        self.loaded: Any = None

    @property
    def evaluation(self) -> Any:
        """Loaded when it is first needed: what is kept needs none."""
        if self.loaded is None:
            self.loaded = self.scores.load(self.model.stem)
        return self.loaded

    def outcomes(self) -> list[Outcome]:
        return [self.outcome(tool) for tool in (ORIGINAL, *self.args.tools)]

    def outcome(self, tool: str) -> Outcome:
        """The kept outcome, completed where something is missing."""
        record = self.folder / f"{tool}.json"
        if record.exists() and "quantize" not in self.args.again:
            found = Outcome(**json.loads(record.read_text()))
        else:
            found = self.made(tool)
            self.keep(record, found)
        wanted = found.timing is None or "latency" in self.args.again
        if wanted and self.args.seconds and not found.remark and tool != ORIGINAL:
            found = self.timed(found)
            self.keep(record, found)
        print(f"{self.model.stem} {tool}: {found.score} {found.ratio} {found.remark}", file=sys.stderr)
        return found

    def keep(self, record: Path, outcome: Outcome) -> None:
        record.write_text(json.dumps(asdict(outcome), indent=1) + "\n")

    def path(self, tool: str) -> Path:
        return self.model if tool == ORIGINAL else self.folder / f"{tool}.onnx"

    def made(self, tool: str) -> Outcome:
        """What the tool makes of the first prepared form of the model that it does not fail on."""
        outcome = Outcome(tool, self.model.stem, self.evaluation.metric)
        if tool == ORIGINAL:
            return self.judged(outcome)
        sources = {"": self.model}
        if tool != OURS:
            sources = {"quant_pre_process": self.preprocessed(), "opset 13": self.prepared()}
        tries = []
        for name, source in sources.items():
            self.path(tool).unlink(missing_ok=True)
            ran = self.ran(QUANTIZERS[tool], source, self.path(tool), self.data())
            made = replace(outcome, prepared=name, seconds=ran.wall, peak=ran.peak, fault=ran.fault)
            tries.append(self.judged(made))
            if not tries[-1].fault:
                return tries[-1]
        return tries[0]

    def ran(self, peer: Peer, source: Path, target: Path, *more: Path) -> Ran:
        try:
            ran = run(peer, self.args.environments, source, target, *more, seconds=self.args.timeout)
        except subprocess.CalledProcessError:
            return Ran(fault="cannot be installed here")
        return ran if ran.fault or target.exists() else replace(ran, fault="wrote no file, and says nothing")

    def data(self) -> Path:
        """The calibration feeds as a folder of .npz."""
        folder = self.folder / "calib"
        if not folder.exists():
            folder.mkdir()
            for index in range(len(self.evaluation.calib)):
                np.savez(folder / f"{index:04}.npz", **self.evaluation.calib[index])
        return folder

    def prepared(self) -> Path:
        return self.derived("prepared.onnx", PREPARE, self.model)

    def preprocessed(self) -> Path:
        return self.derived("preprocessed.onnx", PREPROCESS, self.prepared())

    def derived(self, name: str, peer: Peer, source: Path) -> Path:
        """What `peer` makes of `source`, or `source` where it fails."""
        target = self.folder / name
        if not target.exists() and self.ran(peer, source, target).fault:
            return source
        return target

    def judged(self, outcome: Outcome) -> Outcome:
        """With size, kernels and score, or why it has none."""
        if outcome.fault:
            return outcome
        path = self.path(outcome.tool)
        outcome = replace(outcome, size=path.stat().st_size, stored=operators(path))
        try:
            outcome = replace(outcome, kernels=executed(path, self.folder / "executed.onnx"))
            found = self.evaluation.score(self.evaluation.run(self.scores.open_session(path)))
        except Exception as error:
            return replace(outcome, fault=f"does not run: {str(error).splitlines()[0][:90]}")
        return replace(outcome, score=float(found))

    def timed(self, outcome: Outcome) -> Outcome:
        feeds = [self.evaluation.calib[index] for index in range(SAMPLES)]
        try:
            timing = onnxopt.bench(
                self.model, self.path(outcome.tool), feeds=feeds, seconds=self.args.seconds
            )
        except onnxopt.OnnxoptError as error:
            return replace(outcome, fault=f"cannot be timed: {error}")
        return replace(outcome, timing=timing.to_dict())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--evals", type=Path, required=True, help="a folder with a score.py")
    parser.add_argument("--results", type=Path, required=True, help="models and outcomes are kept here")
    parser.add_argument("--tools", nargs="*", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--only", nargs="*", default=[], help="models")
    parser.add_argument("--again", nargs="*", default=[], choices=["quantize", "latency"])
    parser.add_argument("--seconds", type=float, default=6, help="for one latency; 0: measure none")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a tool on a model")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--json", type=Path, help="everything, for later")
    args = parser.parse_args()
    ort.set_default_logger_severity(3)
    scores = load_scores(args.evals / "score.py")
    names = [name for name in sorted(scores.EVALS) if not args.only or name in args.only]
    found = []
    for model in (args.models / f"{name}.onnx" for name in names):
        if model.exists():
            found.append(Bench(model, scores, args).outcomes())
            show(found[-1])
    summarize(found, args.tools)
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for own in found for one in own], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
