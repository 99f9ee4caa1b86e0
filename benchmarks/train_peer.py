"""onnxsim's training beside ours: the same start file, the same digits, the same number of steps.

    python benchmarks/train.py peer [--seeds 3] [--epochs 8] [--only TASK ...]

onnxsim trains in a process and an environment of its own, see benchmarks/peers.py. Tasks:

- labels: a float net that was trained too short goes on with a cross-entropy (`compile_training_loop`; the
  batch has to be fixed, the loss to be written in nodes);
- labels, 8 bit: a trained net, trained on with integers in its forward pass (`quantize_forward`), quantized;
- int4: onnxsim's own int4 file, weights in blocks of 32, without labels (`apply_qat_all_blocks`);
- 8 bit: onnxsim's own static file, without labels (the same, with learned scales of activations);
- pruned: half the channels, cut by onnxsim, without labels (`apply_block_finetune_all_blocks`);
- pruned, ridge: the same in closed form (`apply_pruning_finetune`).

Ours starts from the same file, and learns from the same float net where there are no labels. The nets: three
matrices; and a CNN with depthwise layers, Flatten written as Reshape, which onnxsim can train. Accuracy in %
on 600 test images in ONNX Runtime, mean and deviation over seeds; seconds without imports; steps of 64.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from benchmarks.peers import ENVIRONMENTS, ORT, Peer, run
from benchmarks.rewrite import row, table
from models.builder import Builder
from models.digits_depthwise import depthwise_cnn, handwritten
from onnxopt.runtimes import open_session
from onnxopt.training import distill, finetune, train_qat

BATCH, RATE = 64, 1e-3

_START = """
import numpy as np, onnx, onnxsim
from onnx import helper, numpy_helper
data, labelled = np.load(more[0]), onnx.shape_inference.infer_shapes(onnx.load(source))
feeds, steps = [{"x": data["x"]}], int(data["steps"])
"""
_START += f"batch, rate = {BATCH}, {RATE}\n"
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    ort.set_default_logger_severity(3)
    table(["net", "task", "float", "start", "onnxsim", "s", "onnxopt", "s"])
    for net in given.nets:
        for task in given.only:
            with tempfile.TemporaryDirectory() as folder:
                cells = [_compared(net, task, seed, given, Path(folder)) for seed in range(given.seeds)]
            row([net, task, *map(_mean, zip(*cells, strict=True))])


def _mean(cells: tuple[float | str, ...]) -> str:
    """Of the seeds; or the first message."""
    told = next((one for one in cells if isinstance(one, str)), None)
    return told if told is not None else f"{np.mean(cells):.1f} ± {np.std(cells):.1f}"  # type: ignore[arg-type]


def _compared(net: str, task: str, seed: int, given: Any, folder: Path) -> list[float | str]:
    """Accuracy of the float net, of the start and of both results, with the seconds of both."""
    train, test = handwritten(seed)

    def accuracy(model: Any) -> float:
        with open_session(model) as session:
            return 100 * float((session.run({"x": test["x"]})["y"].argmax(1) == test["label"]).mean())

    how: dict[str, Any] = {
        "epochs": given.epochs,
        "lr": RATE,
        "schedule": "cosine",
        "batch_size": str(BATCH),
        "seed": seed,
        "holdout": 0,
        "weight_decay": 0.0,
        "optimizer": "adam",
    }
    first = {**how, "epochs": 2 if task == "labels" else 25}
    model: Any = finetune(NETS[net](seed), train, labels="label", **first).model
    source, data, target, start = (folder / f"{seed}{one}" for one in (".onnx", ".npz", "t.onnx", "s.onnx"))
    onnx.save(model, source)
    steps = given.epochs * (len(train["x"]) // BATCH + 1)
    np.savez(data, x=train["x"], label=train["label"], steps=steps)
    own = next((one for one in STARTS if task.startswith(one)), None)
    if own is None:
        start = source
    elif fault := run(STARTS[own], given.environments, source, start, data).fault:
        return [accuracy(source), fault, "", "", "", ""]
    ran = run(TASKS[task], given.environments, source, target, data, start, seconds=600)
    theirs: list[float | str] = [ran.fault, ""] if ran.fault else [accuracy(target), ran.wall]
    begun = time.perf_counter()
    free = {"x": train["x"]}
    if task == "labels":
        result: Any = finetune(start, train, labels="label", **how)
    elif task == "labels, 8 bit":
        result = train_qat(start, train, labels="label", weights="int8", **how)
    elif own == "pruned":
        result = distill(start, free, teacher=source, **how)
    else:
        result = train_qat(start, free, teacher=source, **how)
    return [accuracy(source), accuracy(start), *theirs, accuracy(result.model), time.perf_counter() - begun]
