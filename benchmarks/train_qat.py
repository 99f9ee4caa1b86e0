"""What quantization loses, and what training with it wins back, in ONNX Runtime on the written file.

    python benchmarks/train.py qat [--seeds 5] [--evals EVALS --only NAME ...]

Digits: the handwritten digits of scikit-learn and a depthwise CNN, BatchNormalization folded; accuracy in
per cent on 600 test images, mean and standard deviation over seeds; one scale a tensor. Real models: weights
in four bits, trained without labels on the calibration split of EVALS/score.py, scored on the test split.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.real_models import load_scores
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
MODELS = ("kws_dscnn_bn", "efficientnet_lite0_bn", "ppocr_cls")
REAL: dict[str, dict[str, Any]] = {
    "W4": {"weights": "int4", "activations": "none"},
    "W4 a tensor": {"weights": "int4", "activations": "none", "per_channel": False},
    "W4A8": {"weights": "int4"},
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evals", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    parser.add_argument("--variants", nargs="*", default=list(REAL))
    given = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    if given.seeds:
        digits(given.seeds)
    if given.evals is not None:
        real(given.evals, given.only, given.variants, given.epochs)


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


class Session:
    """As the evaluations want a session."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def run(self, names: list[str], feeds: Any) -> list[np.ndarray]:
        found = self._run(feeds)
        return [found[name] for name in names]


def real(evals: Path, only: list[str], variants: list[str], epochs: int) -> None:
    scores = load_scores(evals)
    table(["model", "weights", "float", "PTQ", "QAT", "won back", "s"])
    for name in only:
        ev = scores.load(name)
        data = {key: np.concatenate([feed[key] for feed in ev.calib]) for key in ev.calib[0]}
        seen = [ev.calib[i] for i in range(0, len(ev.calib), max(1, len(ev.calib) // 64))]
        session = ort.InferenceSession(str(ev.model), providers=["CPUExecutionProvider"])
        wanted = [session.run(ev.outputs, feed) for feed in seen]

        def score(run: Any, split: str = "search", known: Any = (ev, seen, wanted)) -> float:
            """On the test split; to choose the epoch by, the error on samples of calibration, negated."""
            ev, seen, wanted = known
            if split == "final":
                return float(ev.score(ev.run(Session(run))))
            found = [[run(feed)[one] for one in ev.outputs] for feed in seen]
            pairs = ((x, y) for a, b in zip(found, wanted, strict=True) for x, y in zip(a, b, strict=True))
            return -float(np.mean([np.square(x.astype(np.float64) - y).mean() for x, y in pairs]))

        for variant in variants:
            begun = time.perf_counter()
            how: dict[str, Any] = {
                "epochs": epochs,
                "schedule": "cosine",
                "batch_size": "16",
                "lr": 1e-3,
                **REAL[variant],
            }
            report = train_qat(str(ev.model), data, metric=score, holdout=0, **how).report
            before, start, after = report.final.before, report.final.start or 0, report.final.after
            share = f"{(after - start) / (before - start):.0%}" if before != start else ""
            seconds = f"{time.perf_counter() - begun:.0f}"
            row([name, variant, *(f"{one:.4f}" for one in (before, start, after)), share, seconds])
