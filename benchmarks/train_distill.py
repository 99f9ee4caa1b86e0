"""What training brings back, measured in ONNX Runtime on the files it writes.

    python benchmarks/train.py distill [--seeds 5]
    python benchmarks/train.py prune [--seeds 5]

scikit-learn's digits, 1,197 to train on and 600 to test, mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import torch

import onnxopt
import onnxopt.training as training
from benchmarks.rewrite import row, table
from models.digits_depthwise import handwritten

WIDTH = 32


def cnn(width: int) -> onnx.ModelProto:
    """Three convolutions and a linear layer, without trained weights."""
    text = f"""agraph (float[n, 1, 8, 8] x) => (float[n, 10] logits) <
        float[{width}, 1, 3, 3] w1, float[{width}] b1, float[{2 * width}, {width}, 3, 3] w2,
        float[{2 * width}] b2, float[{2 * width}, {2 * width}, 3, 3] w3, float[{2 * width}] b3,
        float[10, {32 * width}] w4, float[10] b4> {{
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)  r1 = Relu(c1)
        c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2, b2)  r2 = Relu(c2)
        c3 = Conv<pads=[1,1,1,1]>(r2, w3, b3)  r3 = Relu(c3)
        f = Flatten(r3)  logits = Gemm<transB=1>(f, w4, b4)
    }}"""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> {text}')
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), value.name))
    del model.graph.value_info[:]
    return model


def last(_run: Any) -> float:
    """Every epoch is as good as another: then the last one is kept."""
    return 0.0


SCRATCH: dict[str, Any] = {
    "epochs": 15,
    "lr": 3e-3,
    "schedule": "cosine{end=0.01}",
    "warmup": 10,
    "init": ("w*=kaiming",),
    "max_drop": "1",
    "holdout": 0.0,
    "metric": last,
}
"""Training from nothing."""
FEW = 100
FEW_MACS = "macs=0.03,multiple=1,least=0.05"
RATES = {"finetune": 3e-3, "distill": 1e-2}
"""With few labels: the best of 1e-3, 3e-3 and 1e-2 for each, on the training digits that are not among the
few, over three seeds that the figures are not of."""


def accuracy(model: ir.Model, test: Mapping[str, np.ndarray]) -> float:
    """In per cent, in ONNX Runtime."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (logits,) = session.run(None, {"x": test["x"]})
    return float((logits.argmax(1) == test["label"]).mean()) * 100


def report(name: str, runs: list[float], against: list[float] | None = None) -> None:
    gain = "" if against is None else f"{np.mean(runs) - np.mean(against):+.2f}"
    row((name, f"{np.mean(runs):.2f} ± {np.std(runs, ddof=1):.2f}", f"{min(runs):.2f}", gain))


def over_seeds(seeds: int, one: Callable[[int], dict[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        scores = one(seed)
        print(f"seed {seed}: {scores}", flush=True)
        for name, value in scores.items():
            found.setdefault(name, []).append(value)
    return found


def distill(options: argparse.Namespace) -> None:
    """A teacher; students of half its width with all labels, with 100, and with none."""

    def one(seed: int) -> dict[str, float]:
        train, test = handwritten(seed)
        scratch: dict[str, Any] = {**SCRATCH, "seed": seed}
        teacher = training.finetune(cnn(WIDTH), train, labels="label", **scratch).graph
        half, few = cnn(WIDTH // 2), {name: array[:FEW] for name, array in train.items()}
        of_few: dict[str, Any] = {**scratch, "epochs": 100, "batch_size": "25"}
        hard, soft = ({**of_few, "lr": RATES[name]} for name in ("finetune", "distill"))
        taught: dict[str, Any] = {"teacher": teacher, "temperature": 4.0}
        students = {
            "half width, all labels": training.finetune(half, train, labels="label", **scratch),
            "half width, distilled without labels": training.distill(
                half, {"x": train["x"]}, **taught, **scratch
            ),
            "half width, 100 labels": training.finetune(half, few, labels="label", **hard),
            "half width, distilled on the same 100": training.distill(
                half, few, labels="label", **taught, **soft
            ),
        }
        return {"teacher": accuracy(teacher, test)} | {
            name: accuracy(result.graph, test) for name, result in students.items()
        }

    found = over_seeds(options.seeds, one)
    table(("digits", "accuracy %", "worst", "gain"))
    names = list(found)
    for name, against in zip(names, ("", "", names[1], "", names[3]), strict=True):
        report(name, found[name], found.get(against))


def prune(options: argparse.Namespace) -> None:
    """The dense model, and with 80 % and 90 % zeros: at once, trained, with the dense one, on a ramp.

    Then with channels for 3 % of its multiply-adds: cut at once with samples, trained, on ramps.
    """
    kinds: dict[str, dict[str, Any]] = {
        "80% trained": {"sparsity": 0.8},
        "90% trained": {"sparsity": 0.9},
        "90% trained, labels and the dense model": {"sparsity": 0.9, "temperature": 4.0},
        "90% on a cubic ramp": {"sparsity": 0.9, "ramp": "cubic"},
        "3% of the MACs on a cubic ramp, taylor": {"channels": FEW_MACS, "ramp": "cubic", "score": "taylor"},
        "3% of the MACs on a cubic ramp, obs": {"channels": f"{FEW_MACS},score=obs", "ramp": "cubic"},
    }
    tuned: dict[str, Any] = {"epochs": 20, "lr": 3e-3, "holdout": 0.0, "metric": last}

    def one(seed: int) -> dict[str, float]:
        train, test = handwritten(seed)
        dense = training.finetune(cnn(WIDTH), train, labels="label", seed=seed, **SCRATCH).graph
        found = {"dense": accuracy(dense, test)}
        for share in (0.8, 0.9):
            at_once = onnxopt.prune(dense, f"prune-weights{{sparsity={share},scope=global}}", bench=False)
            found[f"{share:.0%} at once"] = accuracy(at_once.graph, test)
        seen = [{"x": train["x"][i : i + 1]} for i in range(256)]
        cut = onnxopt.prune(dense, f"prune-channels{{{FEW_MACS}}}", data=seen, bench=False).graph
        found["3% of the MACs at once"] = accuracy(cut, test)
        labels: dict[str, Any] = {"labels": "label", "mix": 0.0, "max_drop": "", "seed": seed}
        recovered = training.recover(cut, dense, train, **tuned, **labels).graph
        found["3% of the MACs at once, trained"] = accuracy(recovered, test)
        for name, more in kinds.items():
            taught: dict[str, Any] = {"teacher": dense} if "temperature" in more else {}
            result = training.prune(dense, train, labels="label", seed=seed, **tuned, **more, **taught)
            found[name] = accuracy(result.graph, test)
        return found

    found = over_seeds(options.seeds, one)
    table(("digits", "accuracy %", "worst", "to dense"))
    for name, runs in found.items():
        report(name, runs, found["dense"])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = parser.add_subparsers(required=True)
    for section in (distill, prune):
        one = sections.add_parser(section.__name__, help=section.__doc__)
        one.set_defaults(run=section)
        one.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.run(options)
