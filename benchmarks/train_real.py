"""What training wins back on pretrained models, in ONNX Runtime on the files it writes.

    python benchmarks/train.py real --evals EVALS [--only ppocr_cls] [--what W4] [--fonts FOLDER] [--seeds 5]

Half the multiply-adds, or weights in four bits, then trained without labels to say what the model said. What
four bits lose is lost by rounding to nearest; where training starts, weights are rounded for the samples.
EVALS holds a score.py whose `load(NAME)` gives `model` (a path), `calib` (complete feeds), `outputs`,
`run(session)` and `score(outputs)`, the last two on the test items, which nothing is chosen or trained by.
The text lines for ppocr_cls are rendered here, in all fonts (.ttf) of a folder: for the figures of the docs
DejaVu, Liberation and FreeFont. The other models learn from `calib`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import onnxopt
import onnxopt.training as training
from benchmarks.real_models import load_scores
from benchmarks.rewrite import row, table
from onnxopt.data.samples import Samples
from onnxopt.reporting.training import TrainingReport
from onnxopt.runtimes import open_session

Arrays = dict[str, np.ndarray]

HELD = 256
"""Samples that the epoch is chosen by, at most."""
COMMON: dict[str, Any] = {"temperature": 4.0, "schedule": "cosine{end=0.01}", "holdout": 0.0}
HALF = "prune-channels{macs=0.5}"
W4: dict[str, Any] = {"weights": "int4", "activations": "none"}
W4_TENSOR: dict[str, Any] = {**W4, "per_channel": False}
FIXED = "scales{lr=0}"
"""For few samples: learned scales disturb weights that were rounded for them. Settings for few samples were
chosen on a third of them, held out."""
RELATIVE = ("weights{relative=true}", "norm-bias{relative=true,lr=0.3}", FIXED)
LINES: dict[str, Any] = {"lr": 1e-3, "batch_size": "16"}
KEYWORDS: dict[str, Any] = {
    "warmup": 20,
    "match": ("*Relu*",),
    "transforms": ("shift{by=2,axes=-2}", "mixup{alpha=0.4}"),
}
PICTURES: dict[str, Any] = {"warmup": 20, "match": ("*Relu*",), "transforms": ("flip", "shift{by=2}")}
RAMP: dict[str, Any] = {"channels": "macs=0.5,score=obs"}
PHOTOS: dict[str, Any] = {
    "batch_size": "8",
    "warmup": 10,
    "match": ("*/Add_output_0", "/_swish_1/*"),
    "transforms": ("flip", "shift{by=16}"),
}


def words() -> list[str]:
    """Those of the documentation of numpy."""
    texts = [inspect.getdoc(one) or "" for one in vars(np).values()]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]{2,12}", text)})


def text_line(number: int, known: list[str], fonts: list[Path]) -> np.ndarray:
    """A line of text, upright or upside down: float32 [3, 48, 192] from -1 to 1, 0 behind its end."""
    rng = np.random.default_rng((7, number))
    text = " ".join(rng.choice(known, rng.integers(1, 4)))
    text += f" {rng.integers(10**5)}" if rng.random() < 0.4 else ""
    text = [text, text.upper(), text.title(), text.lower()][rng.choice(4, p=[0.5, 0.15, 0.2, 0.15])]
    font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), 40)
    left, top, right, bottom = font.getbbox(text)
    pads = rng.integers(2, 12, 4)
    size = (int(right - left + pads[0] + pads[1]), int(bottom - top + pads[2] + pads[3]))
    light, dark = rng.integers(150, 256, 3), rng.integers(0, 110, 3)
    paper, ink = (light, dark) if rng.random() < 0.85 else (dark, light)
    image = Image.new("RGB", size, tuple(map(int, paper)))
    ImageDraw.Draw(image).text((int(pads[0] - left), int(pads[2] - top)), text, tuple(map(int, ink)), font)
    image = image.rotate(rng.normal(0, 1.5), Image.Resampling.BILINEAR, fillcolor=tuple(map(int, paper)))
    image = image.filter(ImageFilter.GaussianBlur(abs(rng.normal(0, 0.8))))
    if rng.random() < 0.5:
        image = image.rotate(180)
    width = min(max(round(48 * size[0] / size[1]), 16), 192)
    pixels = np.asarray(image.resize((width, 48), Image.Resampling.BILINEAR), np.float32)
    pixels = np.clip(pixels + rng.normal(0, rng.uniform(0, 12), pixels.shape), 0, 255)
    line = np.zeros((3, 48, 192), np.float32)
    line[:, :, :width] = pixels.transpose(2, 0, 1) / 127.5 - 1
    return line


def text_lines(count: int, folder: Path) -> np.ndarray:
    fonts, known = sorted(folder.rglob("*.ttf")), words()
    return np.stack([text_line(number, known, fonts) for number in range(count)])


def samples_of(ev: Any, options: argparse.Namespace) -> tuple[Arrays, list[Arrays]]:
    """To learn from, and to choose the epoch by."""
    if ev.name == "ppocr_cls":
        lines = text_lines(options.lines + HELD, options.fonts)
        return {"x": lines[HELD:]}, [{"x": lines[i : i + 1]} for i in range(HELD)]
    calib = [*ev.calib]
    data = {name: np.concatenate([feed[name] for feed in calib]) for name in calib[0]}
    return data, calib[:HELD]


class Session:
    """As the evaluations want a session."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def run(self, names: list[str], feeds: Any) -> list[np.ndarray]:
        found = self._run(feeds)
        return [found[name] for name in names]


def judge_of(ev: Any, model: Path, feeds: Sequence[Arrays]) -> Callable[..., float]:
    """The score on the test items; to choose the epoch by, minus the squared error to a model on samples."""

    def outputs(run: Any) -> list[np.ndarray]:
        return [found[name].astype(np.float64) for found in map(run, feeds) for name in ev.outputs]

    wanted = outputs(open_session(model).run)

    def judge(run: Any, split: str = "search") -> float:
        if split == "final":
            return float(ev.score(ev.run(Session(run))))
        return -float(np.mean([np.square(x - y).mean() for x, y in zip(outputs(run), wanted, strict=True)]))

    return judge


def halved(ev: Any, data: Arrays) -> ir.Model:
    """Half the multiply-adds, nothing trained."""
    first = next(iter(data))
    seen = Samples(
        min(len(data[first]), 256), lambda i: {name: array[i : i + 1] for name, array in data.items()}
    )
    return onnxopt.prune(str(ev.model), HALF, data=seen, bench=False).graph


def recover(ev: Any, data: Arrays, how: Mapping[str, Any]) -> tuple[float, TrainingReport]:
    """Half the multiply-adds, distilled from the dense model: the score of what is cut, and the training."""
    report = training.recover(halved(ev, data), str(ev.model), data, **how).report
    return report.final.before, report


def on_a_ramp(ev: Any, data: Arrays, how: Mapping[str, Any]) -> tuple[float, TrainingReport]:
    """Half the multiply-adds, channel after channel while it is distilled; beside what is cut at once."""
    lost = how["metric"](open_session(halved(ev, data)).run, "final")
    return lost, training.prune(str(ev.model), data, ramp="cubic", **how).report


def quantize(ev: Any, data: Arrays, how: Mapping[str, Any]) -> tuple[float, TrainingReport]:
    """Fewer bits, trained to say what the float model says: the score of plain rounding, and the training.

    Weights are rounded to nearest where the samples are a stream.
    """
    one = [{name: array[:1] for name, array in data.items()}]
    untrained = {"steps": 1, "lr": 0.0, "groups": (), "match": (), "transforms": ()}
    nearest = training.train_qat(str(ev.model), lambda: iter(one), validation=one, **{**how, **untrained})
    assert nearest.report.final.start is not None
    return nearest.report.final.start, training.train_qat(str(ev.model), data, **how).report


def zeroed(ev: Any, data: Arrays, how: Mapping[str, Any]) -> tuple[float, TrainingReport]:
    """Nine of ten weights zero, the rest distilled from the dense model: the score without, the training."""
    masked = onnxopt.prune(str(ev.model), "prune-weights{sparsity=0.9,scope=global}", bench=False).graph
    lost = how["metric"](open_session(masked).run, "final")
    return lost, training.prune(str(ev.model), data, sparsity=0.9, **how).report


RUNS: dict[str, dict[str, tuple[Callable[..., tuple[float, TrainingReport]], dict[str, Any]]]] = {
    "ppocr_cls": {
        "half": (recover, {**LINES, "epochs": 5, "warmup": 50}),
        "W4": (quantize, {**LINES, **W4, "epochs": 2, "warmup": 20}),
        "W4 a tensor": (quantize, {**LINES, **W4_TENSOR, "steps": 400, "warmup": 20}),
    },
    "kws_dscnn_bn": {
        "half": (recover, {**KEYWORDS, "epochs": 200, "lr": 2e-3}),
        "half, ramp": (on_a_ramp, {**KEYWORDS, **RAMP, "epochs": 200, "evaluate": 80, "lr": 2e-3}),
        "W4": (quantize, {**KEYWORDS, **W4, "epochs": 120, "lr": 1e-3, "groups": (FIXED,)}),
        "W4 a tensor": (quantize, {**KEYWORDS, **W4_TENSOR, "epochs": 120, "lr": 1e-3, "groups": (FIXED,)}),
        "zeros": (zeroed, {**KEYWORDS, "epochs": 60, "lr": 2e-3}),
        "zeros, batch": (zeroed, {**KEYWORDS, "epochs": 60, "lr": 2e-3, "statistics": "batch"}),
    },
    "cifar10_resnet8_bn": {
        "half": (recover, {**PICTURES, "epochs": 200, "lr": 2e-3}),
        "half, ramp": (on_a_ramp, {**PICTURES, **RAMP, "epochs": 200, "evaluate": 60, "lr": 2e-3}),
        "W4": (quantize, {**PICTURES, **W4, "epochs": 100, "lr": 1e-4, "groups": (FIXED,)}),
        "zeros": (zeroed, {**PICTURES, "epochs": 20, "lr": 1e-3}),
        "zeros, batch": (zeroed, {**PICTURES, "epochs": 20, "lr": 1e-3, "statistics": "batch"}),
    },
    "efficientnet_lite0_bn": {
        "half": (recover, {**PHOTOS, "epochs": 4, "lr": 1e-3}),
        "W4": (quantize, {**PHOTOS, **W4, "epochs": 8, "lr": 1e-4, "groups": RELATIVE}),
    },
}
"""Model -> what it loses by, and how it is trained then."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evals", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--what", nargs="*", choices=sorted(set().union(*RUNS.values())))
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--lines", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    table(["model", "what", "float", "lost to", "starts at", "trained", "won back, %", "s"])
    scores = load_scores(options.evals / "score.py")
    for name in options.only:
        ev = scores.load(name)
        data, held = samples_of(ev, options)
        judge = judge_of(ev, Path(ev.model), held)
        whole = judge(open_session(str(ev.model)).run, "final")
        for what in filter(RUNS[name].__contains__, options.what or RUNS[name]):
            make, how = RUNS[name][what]
            found = []
            for seed in range(options.seeds):
                lost, report = make(ev, data, {**COMMON, "metric": judge, "seed": seed, **how})
                start, after = report.final.start or report.final.before, report.final.after
                found.append((lost, start, after, 100 * (after - lost) / (whole - lost), report.seconds))
            columns = zip(zip(*found, strict=True), (4, 4, 4, 0, 0), strict=True)
            row([name, what, f"{whole:.4f}", *(spread(each, digits) for each, digits in columns)])


def spread(each: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; one number where all are the same."""
    mean, deviation = np.mean(each), np.std(each, ddof=1) if len(set(each)) > 1 else 0.0
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")
