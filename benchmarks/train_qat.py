"""What quantization loses, and what training with it wins back, in ONNX Runtime on the written file.

    python benchmarks/train.py qat [--seeds 5]

The handwritten digits of scikit-learn and a depthwise CNN, BatchNormalization folded; accuracy in per cent on
600 test images, mean and standard deviation over seeds; one scale a tensor.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.rewrite import row, table
from models.digits_depthwise import depthwise_cnn, handwritten
from onnxopt.training import finetune, train_qat

DIGITS: dict[str, dict[str, Any]] = {
    "W8A8": {"weights": "int8"},
    "W4A8": {"weights": "int4"},
    "W4": {"weights": "int4", "activations": "none"},
    "W2": {"weights": "int2", "epochs": 16},
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    digits(given.seeds)


def digits(seeds: int) -> None:
    found: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(seeds):
        train, test = handwritten(seed)
        start = finetune(
            depthwise_cnn(seed), train, labels="label", epochs=15, lr=5e-3, schedule="cosine",
            weight_decay=0.1, batchnorm=True, batch_size="64", test=test, seed=seed,
        )  # fmt: skip

        def accuracy(run: Any, split: str = "search", known: Any = (train, test)) -> float:
            data = known[split == "final"]
            return 100 * float((run({"x": data["x"]})["y"].argmax(1) == data["label"]).mean())

        for name, options in DIGITS.items():
            scores = []
            for labels in ("label", ()):
                data = train if labels else {"x": train["x"]}
                how: dict[str, Any] = {"epochs": 8, "schedule": "cosine", "per_channel": False, **options}
                report = train_qat(
                    start.model, data, labels=labels, metric=accuracy, seed=seed, holdout=0, **how
                ).report
                scores += [report.final.before, report.final.start or 0, report.final.after]
            found.setdefault(name, []).append((scores[0], scores[1], scores[2], scores[5]))
            print(f"seed {seed} {name}: {scores}", flush=True)
    table(["digits", "float", "PTQ", "QAT, labels", "QAT, no labels"])
    for name, each in found.items():
        row([name, *(f"{np.mean(one):.2f} ± {np.std(one):.2f}" for one in zip(*each, strict=True))])
