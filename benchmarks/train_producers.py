"""QDQ files of the tools that write them: what the trainer makes of each, beside ONNX Runtime.

    python benchmarks/train.py producers --models MODELS --evals EVALS --results RESULTS [--only NAME ...]

Each tool of `PRODUCERS` quantizes each model, in an environment and a process of its own, on the calibration
samples of EVALS/score.py (see benchmarks/quantize.py; files are kept in RESULTS). Of each file are told:

- idle: what `write_back(to_torch(file), file)` gives, without training. The `file` is the same where every
  node and tensor of it is, to the byte, and `outputs` are where ONNX Runtime, optimized and not, computes the
  same bits;
- equal: calibration samples on which the module's largest number of each output stands where ONNX Runtime's
  does, its optimizations off; LSB: the largest difference in steps of 1/255 of the output's range, and in
  brackets that of ONNX Runtime to itself with its optimizations on;
- gradients: weights, and learned scales, that the gradient of a loss reaches, of how many;
- score on the test split: of the float model, of the tool's file, and after training of --epochs on the
  calibration samples without labels (refused: `onnxopt train` would write nothing); error: the squared error
  to the float model that training leaves on those samples, as a share; nodes: the trained file has the same
  operators in the same order.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from benchmarks.peers import ENVIRONMENTS, Peer
from benchmarks.quantize import Bench
from benchmarks.quantizers import QUANTIZERS
from benchmarks.real_models import load_scores
from benchmarks.rewrite import row, table
from benchmarks.train_real import judge_of
from onnxopt.calibration import spread
from onnxopt.errors import OnnxoptError
from onnxopt.graph import walk
from onnxopt.model import load
from onnxopt.protobuf import dump, serialize
from onnxopt.runtimes import Level, open_session
from onnxopt.training import GraphModule, to_torch, train_qat, write_back
from onnxopt.training.loop.optimizers import role_of
from onnxopt.training.scales import learn_scales, scale_groups

MODELS = ("kws_dscnn_bn", "cifar10_resnet8_bn", "ppocr_cls", "efficientnet_lite0_bn", "ppocrv4_rec")
"""Four of convolutions, and one with blocks of attention."""
SEEN = 32
"""Calibration samples that outputs are compared on."""
LEVELS: tuple[Level, ...] = ("none", "all")


def _changed(tool: str, before: str, after: str, imports: str = "") -> Peer:
    peer = QUANTIZERS[tool]
    assert before in peer.body
    return replace(peer, imports=peer.imports + imports, body=peer.body.replace(before, after))


_NNCF_BY_TENSOR = """, advanced_parameters=nncf.AdvancedQuantizationParameters(
    weights_quantization_params=QuantizationParameters(per_channel=False)))"""

PRODUCERS = {
    "ORT by channel": QUANTIZERS["ort-u8s8"],
    "ORT by tensor": QUANTIZERS["ort-defaults"],
    "ORT uint8 weights": _changed("ort-u8s8", "weight_type=QuantType.QInt8", "weight_type=QuantType.QUInt8"),
    "ORT 16 bit, contrib": _changed(
        "ort-u8s8",
        "activation_type=QuantType.QUInt8",
        "activation_type=QuantType.QUInt16, extra_options={'UseQDQContribOps': True}",
    ),
    "NNCF by channel": QUANTIZERS["nncf"],
    "NNCF by tensor": _changed(
        "nncf",
        "subset_size=len(paths))",
        "subset_size=len(paths)" + _NNCF_BY_TENSOR,
        "\nfrom nncf.quantization.advanced_parameters import QuantizationParameters",
    ),
    "onnxsim by channel": QUANTIZERS["onnxsim-minmax"],
    "onnxsim by tensor": _changed(
        "onnxsim-minmax", "method='minmax'", "method='minmax', full_graph=True, per_channel=False"
    ),
    "AIMET by channel": _changed("aimet", "dummy_input=", "config_file='default', dummy_input="),
    "AIMET by tensor": _changed("aimet", "dummy_input=", "config_file='default_config.json', dummy_input="),
    "AIMET, floats": _changed("aimet", "prequantize_constants=True", "export_int32_bias=True"),
    "ModelOpt by channel": QUANTIZERS["modelopt"],
    "Quark by channel": _changed(
        "quark", '("U8S8_AAWS")', '("U8S8_AAWS")\nconfig.global_quant_config.per_channel = True'
    ),
    "Quark by tensor": QUANTIZERS["quark"],
    "Quark 16 bit": _changed("quark", "U8S8_AAWS", "U16S8_AAWS"),
}
"""ModelOpt has no int8 weights by tensor."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--evals", type=Path, required=True, help="a folder with a score.py")
    parser.add_argument("--results", type=Path, required=True, help="the quantized files are kept here")
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="models")
    parser.add_argument("--tools", nargs="*", default=list(PRODUCERS), choices=list(PRODUCERS))
    parser.add_argument("--epochs", type=int, default=1, help="0: do not train")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a tool on a model")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    ort.set_default_logger_severity(3)
    scores = load_scores(given.evals / "score.py")
    columns = ["model", "written by", "file", "outputs", "equal", "LSB", "weights", "scales", "float", "PTQ"]
    table([*columns, *(["error", "trained", "nodes"] if given.epochs else []), "s"])
    for name in given.only:
        bench = Bench(given.models / f"{name}.onnx", scores, given)
        for tool in given.tools:
            target = bench.folder / f"{tool.replace(',', '').replace(' ', '-')}.onnx"
            fault = "" if target.exists() else _quantized(bench, PRODUCERS[tool], target)
            row([name, tool, *([fault] if fault else _told(bench, target, given.epochs))])


def _quantized(bench: Bench, peer: Peer, target: Path) -> str:
    """Why the tool cannot; empty: it wrote the file."""
    for source in (bench.preprocessed(), bench.prepared()):
        fault = bench.ran(peer, source, target, bench.data()).fault
        if not fault:
            return ""
    return fault


Outputs = list[list[np.ndarray]]
"""Of each sample the outputs that are asked for."""


def _told(bench: Bench, file: Path, epochs: int) -> Iterator[str]:
    """The cells of a file."""
    begun, ev = time.perf_counter(), bench.evaluation
    seen = [*spread(ev.calib, SEEN)]
    module = to_torch(file)
    back = serialize(dump(write_back(module, file)))
    yield "same" if _content(back) == _content(file.read_bytes()) else "differ"
    plain, quick = (_executed(file, ev.outputs, seen, level) for level in LEVELS)
    again = [_executed(back, ev.outputs, seen, level) for level in LEVELS]
    yield "same" if all(map(_equal, again, (plain, quick))) else "differ"
    with torch.no_grad():
        found = [module(feed) for feed in seen]
    ours = [[one[name].numpy() for name in ev.outputs] for one in found]
    equal = [np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in _pairs(ours, plain)]
    yield f"{np.mean(equal):.2%}"
    yield f"{_steps(ours, plain):.2g} ({_steps(quick, plain):.2g})"
    yield from _reached(module, load(file), seen[:4])
    yield from (f"{ev.score(ev.run(bench.scores.open_session(path))):.4f}" for path in (bench.model, file))
    if epochs:
        yield from _trained(bench, file, seen, epochs)
    yield f"{time.perf_counter() - begun:.0f}"


def _content(model: bytes) -> list[bytes]:
    """Every node, tensor, input and output of a file."""
    graph = onnx.load_from_string(model).graph
    for node in graph.node:  # an empty name may be there or not
        if not node.name:
            node.ClearField("name")
    parts = (graph.node, graph.initializer, graph.input, graph.output)
    return [one.SerializeToString(deterministic=True) for part in parts for one in part]


def _executed(model: Any, names: Sequence[str], feeds: Sequence[Any], level: Level) -> Outputs:
    """What ONNX Runtime gives."""
    with open_session(model, level=level) as session:
        found = [session.run(feed) for feed in feeds]
    return [[one[name] for name in names] for one in found]


def _pairs(found: Outputs, wanted: Outputs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for one, other in zip(found, wanted, strict=True):
        yield from zip(one, other, strict=True)


def _equal(found: Outputs, wanted: Outputs) -> bool:
    return all(np.array_equal(a, b) for a, b in _pairs(found, wanted))


def _steps(found: Outputs, wanted: Outputs) -> float:
    """The largest difference, in 255ths of the range of an output."""
    return max(float(np.abs(a - b).max() / (np.ptp(b) / 255)) for a, b in _pairs(found, wanted))


def _reached(module: GraphModule, model: ir.Model, feeds: Sequence[Any]) -> Iterator[str]:
    """Weights and scales that a gradient reaches, of how many; away from where integers have no error."""
    learn_scales(module, scale_groups(model))
    with torch.no_grad():
        for one in module.parameters():
            one.add_(0.01 * one.abs().mean() * torch.randn_like(one))
    for feed in feeds:
        floats = (one for one in module(feed).values() if one.is_floating_point())
        torch.stack([one.square().mean() for one in floats]).sum().backward()
    for kind in (False, True):
        own = [one for one in module.parameters() if (role_of(one) == "scales") == kind]
        reached = sum(one.grad is not None and bool(one.grad.any()) for one in own)
        yield f"{reached}/{len(own)}"


def _trained(bench: Bench, file: Path, seen: Sequence[Any], epochs: int) -> Iterator[str]:
    """Error and score of the trained file, and whether it is of the same nodes."""
    ev = bench.evaluation
    done = bench.folder / f"trained-{file.name}"
    alike = len({tuple(one.shape for one in feed.values()) for feed in ev.calib}) == 1
    try:
        result = train_qat(
            str(file), str(bench.data()), teacher=str(bench.model), epochs=epochs, batch_size="8",
            accumulate=1 if alike else 8, lr=1e-5, schedule="cosine", holdout=0,
            metric=judge_of(ev, bench.model, seen), folder=f"{done}.train",
        )  # fmt: skip
    except OnnxoptError as error:
        yield str(error)
        return
    choice, final = result.report.choice, result.report.final
    yield f"{choice.after / (choice.start or 1):.2f}"
    yield f"{final.after:.4f}{' (refused)' if result.report.reason else ''}"
    last = load(Path(f"{done}.train") / "last.onnx")
    before, after = ([node.op_type for node in walk(one.graph)] for one in (load(file), last))
    yield "same" if before == after else "differ"
