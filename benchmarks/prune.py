"""onnxopt's pruning beside onnxsim's, in one run: score, multiply-adds, bytes, packed bytes, latency.

    python benchmarks/prune.py --models MODELS --evals EVALS --results RESULTS [--only ...]

EVALS holds a score.py whose `load(NAME)` gives `calib` (complete feeds), `run(session)`, `score(outputs)` and
`metric`. Passes are fitted to `calib`, the score is on the test items; nothing is trained. Tables:

- channels: half the multiply-adds, 0.65 of the time, 30 % of the channels, by plain scores of weights and
  with samples;
- weights: 50 %, 80 % and 90 % zeros, and 90 % with 5 bits a weight; packed bytes are those of `onnxopt pack`,
  for all tools, over the bytes of the float32 file;
- ranks: products and convolutions of lower rank;
- exactness: half the channels of each group cut at random, against zeros in their place in the whole model;
- packs: every model as it is, and a fully connected net behind the passes of weights; all come back the same.

CPU time is that of a run on one thread, as a ratio to the original at the runtime's default level, paired;
A/A is the original to itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import zstandard
from onnx import helper, numpy_helper

import onnxopt
from benchmarks.peers import ENVIRONMENTS, ORT, Peer, run
from benchmarks.real_models import load_scores
from benchmarks.rewrite import row, table
from onnxopt.inspection import macs
from onnxopt.model import clone
from onnxopt.pruning.cut import cut, mask
from onnxopt.pruning.structure import survey
from onnxopt.pruning.weights import sparsity

SAMPLES = 4
"""Calibration samples that latency is measured on, in turn."""

_READ = """
import glob, numpy as np
paths = sorted(glob.glob(more[0] + "/*.npz"))
feeds = [{k: v for k, v in np.load(path).items()} for path in paths]
"""


def ours(passes: str, *, data: bool, latency: float | None = None) -> Peer:
    fed = "data=more[0], " if data else ""
    budget = "bench=False" if latency is None else f"latency={latency}"
    body = f"result = onnxopt.prune(source, {passes!r}, {fed}{budget})\n"
    return Peer("", (), "import onnxopt, onnxopt.api", body + "result.save(target)")


def onnxsim(call: str) -> Peer:
    body = _READ + "model = onnxsim.simplify(source)[0]\n" + f"onnx.save(onnxsim.{call}, target)"
    return Peer("onnxsim", ("onnxsim==0.8.1", *ORT), "import onnx, onnxsim", body)


CHANNELS = {
    "onnxopt macs=0.5": ours("prune-channels{macs=0.5}", data=False),
    "onnxopt macs=0.5, samples": ours("prune-channels{macs=0.5}", data=True),
    "onnxopt latency=0.65, samples": ours("prune-channels", data=True, latency=0.65),
    "onnxopt ratio=0.3": ours("prune-channels{ratio=0.3}", data=False),
    "onnxopt ratio=0.3, samples": ours("prune-channels{ratio=0.3}", data=True),
    "onnxsim sparsity=0.3": onnxsim("apply_structured_pruning(model, sparsity=0.3)"),
    "onnxsim wanda, samples": onnxsim(
        "apply_structured_wanda_pruning(model, calibration_data=feeds, sparsity=0.3)"
    ),
}
_ALL = "protect=,small=0"
"""Depthwise and small layers too, as of the other tools."""
WEIGHTS = {
    "onnxopt 50 %, obs": ours(f"prune-weights{{sparsity=0.5,score=obs,{_ALL}}}", data=True),
    "onnxopt 80 %": ours(f"prune-weights{{sparsity=0.8,{_ALL}}}", data=False),
    "onnxopt 80 %, obs": ours(f"prune-weights{{sparsity=0.8,score=obs,{_ALL}}}", data=True),
    "onnxopt 90 %": ours(f"prune-weights{{sparsity=0.9,{_ALL}}}", data=False),
    "onnxopt 90 %, 5 bits": ours(
        f"prune-weights{{sparsity=0.9,{_ALL}}},cluster-weights{{bits=5,depthwise=true}}", data=False
    ),
    "onnxsim 50 %, sparsegpt": onnxsim(
        "apply_sparsegpt_pruning(model, calibration_data=feeds, sparsity=0.5)"
    ),
    "onnxsim 80 %": onnxsim("apply_magnitude_pruning(model, sparsity=0.8, global_sparsity=True)"),
    "onnxsim 80 %, sparsegpt": onnxsim(
        "apply_sparsegpt_pruning(model, calibration_data=feeds, sparsity=0.8)"
    ),
    "onnxsim 90 %": onnxsim("apply_magnitude_pruning(model, sparsity=0.9, global_sparsity=True)"),
}
RANKS = {
    "onnxopt energy=0.999, samples": ours("factorize-weights{energy=0.999}", data=True),
    "onnxopt energy=0.99, samples": ours("factorize-weights{energy=0.99}", data=True),
    "onnxopt energy=0.95": ours("factorize-weights{energy=0.95}", data=False),
}
OF_RANKS = ("silero_vad_sequence", "super_resolution")
OF_CHANNELS = ("cifar10_resnet8_bn", "efficientnet_lite0_bn", "kws_dscnn_bn", "ppocr_cls")
OF_WEIGHTS = ("cifar10_resnet8_bn", "dtln_1", "efficientnet_lite0_bn", "kws_dscnn_bn", "ppocrv4_rec")


@dataclass(frozen=True)
class Bench:
    """One model with its evaluation."""

    model: Path
    evaluation: Any
    scores: Any
    args: argparse.Namespace

    def line(self, name: str, tool: Peer) -> list[str]:
        target = self.args.results / f"{self.model.stem}-{name.replace(' ', '_').replace('%', '')}.onnx"
        ran = run(tool, self.args.environments, self.model, target, self.data(), seconds=self.args.timeout)
        if ran.fault:
            return [name, *[""] * 8, ran.fault]
        score = self.evaluation.score(self.evaluation.run(self.scores.open_session(target)))
        return [name, f"{score:.4f}", *self.sizes(target), *self.latency(target), f"{ran.wall:.0f}", ""]

    def sizes(self, target: Path) -> tuple[str, ...]:
        before, after = onnxopt.load(self.model), onnxopt.load(target)
        feeds = {name: array.shape for name, array in self.evaluation.calib[0].items()}
        was, now = (macs(one, feeds) for one in (before, after))
        kept = f"{now / was:.2f}" if isinstance(was, int) and isinstance(now, int) else ""
        layers = sparsity(after)
        zeros = sum(one.zeros for one in layers) / max(sum(one.elements for one in layers), 1)
        packed = target.with_suffix(".onnxpack")
        onnxopt.pack(target, packed)
        size = self.model.stat().st_size
        return kept, f"{zeros:.2f}", *(f"{path.stat().st_size / size:.3f}" for path in (target, packed))

    def latency(self, target: Path) -> tuple[str, str]:
        if not self.args.seconds:
            return "", ""
        feeds = [self.evaluation.calib[index] for index in range(SAMPLES)]
        timing = onnxopt.bench(self.model, target, feeds=feeds, seconds=self.args.seconds).to_dict()["cpu"]
        return f"{timing['ratio']['value']:.3f}", f"{timing['control']['value']:.3f}"

    def data(self) -> Path:
        folder: Path = self.args.results / f"{self.model.stem}-calib"
        if not folder.exists():
            folder.mkdir(parents=True)
            for index in range(len(self.evaluation.calib)):
                np.savez(folder / f"{index:04}.npz", **self.evaluation.calib[index])
        return folder


def show(title: str, names: tuple[str, ...], tools: Mapping[str, Peer], args: argparse.Namespace) -> None:
    scores = load_scores(args.evals / "score.py")
    for name in names:
        model = args.models / f"{name}.onnx"
        if (args.only and name not in args.only) or not model.exists():
            continue
        bench = Bench(model, scores.load(name), scores, args)
        whole = bench.evaluation.score(bench.evaluation.run(scores.open_session(model)))
        columns = ("score", "MACs", "zeros", "bytes", "packed", "CPU time", "A/A", "s", "remark")
        print(f"\n### {title}: {name}, {bench.evaluation.metric} {whole:.4f}\n")
        table(("tool", *columns))
        for tool, peer in tools.items():
            row(bench.line(tool, peer))


def show_exactness(args: argparse.Namespace) -> None:
    """SQNR between both over the worst output, beside what the runtime's levels make of the masked one."""
    print("\n### channels: cut against masked\n")
    table(("model", "groups", "MACs", "SQNR", "own noise", ""))
    for path in sorted(args.models.glob("*.onnx")):
        if args.only and path.stem not in args.only:
            continue
        try:
            whole = onnxopt.optimize(path, target="generic", bench=False, freeze_initializers=True).graph
        except onnxopt.OnnxoptError as error:
            row([path.stem, *[""] * 4, str(error)])
            continue
        smaller, masked = clone(whole), clone(whole)
        structure, twin, random = survey(smaller), survey(masked), np.random.default_rng(0)
        gone = np.zeros(len(structure.solution.pinned), bool)
        for group in structure.groups:
            gone[random.permutation(group.channels)[: len(group.channels) // 2]] = True
        kept = structure.macs(gone) / max(structure.macs(), 1)
        cut(structure, gone)
        mask(twin, gone)
        verdict = onnxopt.verify(masked, smaller)
        sizes = [str(len(structure.groups)), f"{kept:.2f}"]
        row(
            [path.stem, *sizes, *(f"{one or 0:.0f}" for one in (verdict.sqnr, verdict.floor)), verdict.status]
        )


def fully_connected() -> onnx.ModelProto:
    """784-2048-2048-10, weights of Student's t with 5 degrees of freedom."""
    random, sizes = np.random.default_rng(0), (784, 2048, 2048, 10)
    nodes, weights = [], []
    for layer, (wide, narrow) in enumerate(itertools.pairwise(sizes)):
        array = random.standard_t(5, (wide, narrow)) / np.sqrt(wide)
        weights.append(numpy_helper.from_array(array.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"]))
        nodes.append(helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"]))
    ends = [helper.make_tensor_value_info(name, 1, ["N", n]) for name, n in (("x0", 784), ("x3", 10))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def show_packs(args: argparse.Namespace) -> None:
    """The models as they are, and the fully connected net behind the passes of weights."""
    made = args.results / "fully_connected.onnx"
    onnx.save(fully_connected(), made)
    files = {path.name: path for path in sorted(args.models.glob("*.onnx"))}
    for passes in (
        "prune-weights{sparsity=0.8}",
        "prune-weights{sparsity=0.9}",
        "prune-weights{sparsity=0.9},cluster-weights{bits=5}",
    ):
        path = args.results / f"fully_connected-{len(files)}.onnx"
        onnxopt.prune(made, passes, bench=False).save(path)
        files[f"fully connected, {passes}"] = path
    print("\n### packs\n")
    table(("model", "bytes", "zstd -19", "pack", "of float32"))
    total = np.zeros(3, int)
    for name, path in files.items():
        packed, back = args.results / "pack", args.results / "back.onnx"
        onnxopt.pack(path, packed)
        onnxopt.unpack(packed, back)
        assert back.read_bytes() == path.read_bytes()
        plain = len(zstandard.ZstdCompressor(19).compress(path.read_bytes()))
        sizes = np.array((path.stat().st_size, plain, packed.stat().st_size))
        dense = made if name.startswith("fully") else path
        total += sizes if dense is path else 0
        row([name, *map(str, sizes), f"{sizes[2] / dense.stat().st_size:.4f}"])
    row(["all models", *map(str, total), f"{total[2] / total[0]:.4f}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--evals", type=Path, required=True, help="a folder with a score.py")
    parser.add_argument("--results", type=Path, required=True, help="models are kept here")
    parser.add_argument("--only", nargs="*", default=[], help="models")
    parser.add_argument("--seconds", type=float, default=6, help="for one latency; 0: measure none")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a tool on a model")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    ort.set_default_logger_severity(3)
    show("channels", OF_CHANNELS, CHANNELS, args)
    show("weights", OF_WEIGHTS, WEIGHTS, args)
    show("ranks", OF_RANKS, RANKS, args)
    show_exactness(args)
    show_packs(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
