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
    "W3A8": {"weights": "int3"},
    "W2": {"weights": "int2", "activations": "none"},
}
TRAINED: dict[str, Any] = {"epochs": 15, "lr": 3e-3, "schedule": "cosine", "warmup": 20, "holdout": 0.0}
SCALES = ("scales{lr=3}",)
"""Chosen among 1, 3 and 10 on training digits that were held out, over seeds that the figures are not of."""


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

        def accuracy(run: Any, split: str = "search", known: Any = test) -> float:
            """On the test images; of the epochs the last is kept."""
            if split == "search":
                return 0.0
            return 100 * float((run({"x": known["x"]})["y"].argmax(1) == known["label"]).mean())

        how: dict[str, Any] = {**TRAINED, "metric": accuracy, "seed": seed}
        start = finetune(
            depthwise_cnn(seed), train, labels="label", batchnorm=True, weight_decay=0.1,
            **{**how, "lr": 5e-3, "batch_size": "64"},
        ).model  # fmt: skip
        more = finetune(start, train, labels="label", max_drop="100", **how).report.final.after
        for name, options in DIGITS.items():
            scores = []
            for labels in ("label", ()):
                data = train if labels else {"x": train["x"]}
                report = train_qat(
                    start, data, labels=labels, per_channel=False, groups=SCALES, **how, **options
                ).report
                scores += [report.final.before, report.final.start or 0, report.final.after]
            found.setdefault(name, []).append((scores[0], more, scores[1], scores[2], scores[5]))
            print(f"seed {seed} {name}: {found[name][-1]}", flush=True)
    table(["digits", "float", "float, trained on", "PTQ", "QAT, labels", "QAT, no labels"])
    for name, each in found.items():
        row([name, *(f"{np.mean(one):.2f} ± {np.std(one, ddof=1):.2f}" for one in zip(*each, strict=True))])
