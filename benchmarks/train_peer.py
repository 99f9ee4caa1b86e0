"""onnxsim's training beside ours: the same start file, the same digits, the same number of steps.

    python benchmarks/train.py peer [--seeds 3] [--epochs 8] [--only TASK ...] [--evals EVALS --models MODELS]

onnxsim trains in a process and an environment of its own, see benchmarks/peers.py. Tasks:

- labels: a float net that was trained too short goes on with a cross-entropy (`compile_training_loop`; the
  batch has to be fixed, the loss to be written in nodes);
- labels, 8 bit: a trained net, trained on with integers in its forward pass (`quantize_forward`), quantized;
- int4: onnxsim's own int4 file, weights in blocks of 32, without labels (`apply_qat_all_blocks`);
- 8 bit: onnxsim's own static file, without labels (the same, with learned scales of activations);
- pruned: half the channels, cut by onnxsim, without labels (`apply_block_finetune_all_blocks`);
- pruned, ridge: the same in closed form (`apply_pruning_finetune`).

Ours starts from the same file, and learns from the same float net where there are no labels; its file is the
best epoch's, also where `onnxopt train` would refuse it. The nets: three matrices; a CNN with depthwise
layers, Flatten written as Reshape, which onnxsim can train; and, given EVALS/score.py, pretrained ones on
their calibration samples, without labels. Scores in % on test samples in ONNX Runtime, mean and deviation
over seeds; CPU seconds without imports; steps of 64 at 1e-3, of 16 at 1e-4 for pretrained nets.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from benchmarks.peers import ENVIRONMENTS, ORT, Peer, run
from benchmarks.real_models import load_scores
from benchmarks.rewrite import row, table
from benchmarks.train_real import Session
from models.builder import Builder
from models.digits_depthwise import depthwise_cnn, handwritten
from onnxopt.runtimes import open_session
from onnxopt.training import distill, finetune, train_qat

_START = """
import numpy as np, onnx, onnxsim
from onnx import helper, numpy_helper
data, labelled = np.load(more[0]), onnx.shape_inference.infer_shapes(onnx.load(source))
feeds = [{port.name: data[port.name] for port in labelled.graph.input}]
batch, rate, steps = int(data["batch"]), float(data["rate"]), int(data["steps"])
"""
_LABELS = """
model = onnx.load(source)
names = [one.name for one in model.graph.initializer if one.data_type == 1]
for port in (*model.graph.input, *model.graph.output):
    port.type.tensor_type.shape.dim[0].dim_value = batch
model.graph.input.append(helper.make_tensor_value_info("wanted", 1, [batch, 10]))
model.graph.initializer.append(numpy_helper.from_array(np.float32(-10), "minus_ten"))
for op, inputs, output, how in (
    ("Softmax", ["y"], "p", {"axis": 1}), ("Log", ["p"], "log_p", {}),
    ("Mul", ["log_p", "wanted"], "own", {}), ("ReduceMean", ["own"], "mean", {"keepdims": 0}),
    ("Mul", ["mean", "minus_ten"], "loss", {}),
):
    model.graph.node.append(helper.make_node(op, inputs, [output], **how))
model.graph.output.append(helper.make_tensor_value_info("loss", 1, []))
one_hot = np.eye(10, dtype=np.float32)[data["label"]]
first = [{"x": data["x"][:batch], "wanted": one_hot[:batch]}]
loop = onnxsim.compile_training_loop(model, "loss", names, quantize_forward=QUANTIZE, calibration_data=first)
rng, left = np.random.default_rng(0), []
for step in range(steps):
    left = left if len(left) >= batch else rng.permutation(len(one_hot))
    now, left = left[:batch], left[batch:]
    loop({"x": data["x"][now], "wanted": one_hot[now]}, rate * (1 + np.cos(np.pi * step / steps)) / 2)
trained, result = loop.parameters(), onnx.load(source)
for one in result.graph.initializer:
    if one.name in trained:
        one.CopyFrom(numpy_helper.from_array(trained[one.name], one.name))
"""
_QUANTIZED = """
result = onnxsim.quantize_static(onnx.shape_inference.infer_shapes(result), calibration_data=feeds)
"""
_SAVE = "onnx.save(result, target)\n"
_BLOCKS = """
result, blocks = onnxsim.{function}(
    labelled, onnx.load(more[1]), calibration_data=feeds, num_iterations=steps, batch_size=batch,
    learning_rate=rate, {options}
)
faults = [one.skipped_reason for one in blocks if not one.trained]
if not blocks or len(faults) == len(blocks):
    raise SystemExit(faults[0] if faults else "it finds no block to train")
"""
_RIDGE = "result = onnxsim.apply_pruning_finetune(source, more[1], calibration_data=feeds)\n"


def _onnxsim(body: str) -> Peer:
    return Peer("onnxsim", ("onnxsim==0.8.1", *ORT), "import onnx.shape_inference", _START + body + _SAVE)


def _blocks(function: str, options: str) -> Peer:
    return _onnxsim(_BLOCKS.format(function=function, options=options))


STARTS = {
    "int4": _onnxsim("result = onnxsim.quantize_weight_only_int4(labelled)\n"),
    "8 bit": _onnxsim("result = onnx.load(source)\n" + _QUANTIZED),
    "pruned": _onnxsim("result = onnxsim.apply_structured_pruning(source, 0.5)\n"),
}
TASKS = {
    "labels": _onnxsim(_LABELS.replace("QUANTIZE", "False")),
    "labels, 8 bit": _onnxsim(_LABELS.replace("QUANTIZE", "True") + _QUANTIZED),
    "int4": _blocks("apply_qat_all_blocks", "learn_scales=True"),
    "8 bit": _blocks("apply_qat_all_blocks", "learn_activation_scales=True"),
    "pruned": _blocks("apply_block_finetune_all_blocks", "max_layers_per_block=99"),
    "pruned, ridge": _onnxsim(_RIDGE),
}


def matrices(seed: int) -> onnx.ModelProto:
    """``x`` float32 (batch, 1, 8, 8) to ``y`` float32 (batch, 10): 64, 128, 64 and 10 units."""
    b = Builder(seed)
    value, sizes = b.add("Reshape", "x", b.ints(-1, 64)), (64, 128, 64, 10)
    for before, after in itertools.pairwise(sizes):
        bias = b.constant(np.zeros(after))
        value = b.add("Gemm", value, b.weight(before, after, scale=(2 / before) ** 0.5), bias)
        value = b.add("Relu", value) if after > 10 else value
    b.add("Identity", value, outputs=["y"])
    return b.model("matrices", [("x", ["batch", 1, 8, 8])], [("y", ["batch", 10])], opset=21)


def convolutions(seed: int) -> onnx.ModelProto:
    """`depthwise_cnn` in the operators that onnxsim trains, and of the opset that has int4."""
    model = depthwise_cnn(seed)
    flat = next(node for node in model.graph.node if node.op_type == "Flatten")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, -1]), "flat_shape"))
    flat.op_type = "Reshape"
    flat.input.append("flat_shape")
    model.opset_import[0].version, model.ir_version = 21, 10
    return model


NETS = {"matrices": matrices, "CNN": convolutions}


PRETRAINED = ("kws_dscnn_bn", "ppocr_cls")
_SIMPLIFIED = Peer(
    "onnxsim",
    ("onnxsim==0.8.1", *ORT),
    "import onnx, onnxsim, onnx.version_converter",
    """
model = onnx.version_converter.convert_version(onnxsim.simplify(source)[0], 21)
model.ir_version = 10
onnx.save(model, target)
""",
)


@dataclass(frozen=True)
class Case:
    """A float net in a file, the arrays to train it on, and how good a net is, in %."""

    source: Path
    arrays: Mapping[str, np.ndarray]
    score: Callable[[Any], float]
    batch: int = 64
    rate: float = 1e-3
    seed: int = 0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--evals", type=Path, help="a folder with a score.py; with --models")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    ort.set_default_logger_severity(3)
    table(["net", "task", "float", "start", "onnxsim", "s", "onnxopt", "s"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for net in given.nets:
            for task in given.only:
                cases = (_digits(net, task, seed, folder) for seed in range(given.seeds))
                cells = [_compared(case, task, given, folder) for case in cases]
                row([net, task, *map(_mean, zip(*cells, strict=True))])
        for net in PRETRAINED if given.evals else ():
            case = _pretrained(net, given, folder)
            for task in (one for one in given.only if not one.startswith("labels")):
                row([net, task, *map(_mean, zip(_compared(case, task, given, folder), strict=True))])


def _mean(cells: tuple[float | str, ...]) -> str:
    """Of the seeds; or the first message."""
    told = next((one for one in cells if isinstance(one, str)), None)
    if told is not None:
        return told
    deviation = f" ± {np.std(cells):.1f}" if len(cells) > 1 else ""  # type: ignore[arg-type]
    return f"{np.mean(cells):.1f}{deviation}"  # type: ignore[arg-type]


def _digits(net: str, task: str, seed: int, folder: Path) -> Case:
    """A net trained on the digits: for 2 epochs, where it is to be trained on, else for 25."""
    train, test = handwritten(seed)

    def accuracy(model: Any) -> float:
        with open_session(model) as session:
            return 100 * float((session.run({"x": test["x"]})["y"].argmax(1) == test["label"]).mean())

    case = Case(folder / f"{seed}.onnx", train, accuracy, seed=seed)
    how = _options(case, 2 if task == "labels" else 25)
    model: Any = finetune(NETS[net](seed), train, labels="label", **how).model
    onnx.save(model, case.source)
    return case


def _pretrained(net: str, given: Any, folder: Path) -> Case:
    """A pretrained net as onnxsim simplifies it."""
    scores = load_scores(given.evals / "score.py")
    ev = scores.load(net)

    def score(model: Any) -> float:
        with open_session(model) as session:
            return 100 * float(ev.score(ev.run(Session(session.run))))

    arrays = {name: np.concatenate([feed[name] for feed in ev.calib]) for name in ev.calib[0]}
    case = Case(folder / f"{net}.onnx", arrays, score, 16, 1e-4)
    fault = run(_SIMPLIFIED, given.environments, given.models / f"{net}.onnx", case.source).fault
    assert not fault, fault
    return case


def _options(case: Case, epochs: int) -> dict[str, Any]:
    """What both are given."""
    given = {"epochs": epochs, "batch_size": str(case.batch), "seed": case.seed, "lr": case.rate}
    return {**given, "schedule": "cosine", "holdout": 0, "weight_decay": 0.0, "optimizer": "adam"}


def _compared(case: Case, task: str, given: Any, folder: Path) -> list[float | str]:
    """The score of the float net, of the start and of both results, with the seconds of both."""
    source, (data, target, start) = case.source, (folder / one for one in ("d.npz", "t.onnx", "s.onnx"))
    steps = given.epochs * (len(next(iter(case.arrays.values()))) // case.batch + 1)
    plan: dict[str, Any] = {**case.arrays, "batch": case.batch, "rate": case.rate, "steps": steps}
    np.savez(data, **plan)
    own = next((one for one in STARTS if task.startswith(one)), None)
    if own is None:
        start = source
    elif fault := run(STARTS[own], given.environments, source, start, data).fault:
        return [case.score(source), fault, "", "", "", ""]
    ran = run(TASKS[task], given.environments, source, target, data, start, seconds=600)
    theirs: list[float | str] = [ran.fault, ""] if ran.fault else [case.score(target), ran.cpu]
    begun = time.process_time()
    free = {name: array for name, array in case.arrays.items() if name != "label"}
    how, kept = _options(case, given.epochs), folder / "ours"
    if task == "labels":
        finetune(start, case.arrays, labels="label", folder=kept, **how)
    elif task == "labels, 8 bit":
        train_qat(start, case.arrays, labels="label", weights="int8", folder=kept, **how)
    elif own == "pruned":
        distill(start, free, teacher=source, folder=kept, **how)
    else:
        train_qat(start, free, teacher=source, folder=kept, **how)
    seconds = time.process_time() - begun
    return [case.score(source), case.score(start), *theirs, case.score(kept / "best.onnx"), seconds]
