"""What training brings back, measured in ONNX Runtime on the files it writes.

    python benchmarks/train.py distill [--seeds 5]
    python benchmarks/train.py prune [--seeds 5]
    python benchmarks/train.py recover --models MODELS --evals EVALS [--only ppocr_cls]

- distill, prune: scikit-learn's digits, 1,197 to train on and 600 to test, mean and deviation over seeds.
- recover: pretrained models with half their multiply-adds, distilled from themselves without labels: EVALS
  holds a score.py whose `load(NAME)` gives `calib` (complete feeds), `run(session)`, `score(outputs)` and
  `metric`; the score is on the test items. The text lines for ppocr_cls are rendered here, in any fonts that
  --fonts (a folder) holds; the other models learn from `calib`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

import onnxopt
import onnxopt.training as training
from benchmarks.real_models import load_scores
from benchmarks.rewrite import row, table
from onnxopt.data.samples import Samples
from onnxopt.inspection import macs
from onnxopt.model import load

TESTED = 600
WIDTH = 32


def digits(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Handwritten digits to train on and to test, 8 x 8, from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels[order].astype(np.int64)
    return {"x": x[TESTED:], "y": y[TESTED:]}, {"x": x[:TESTED], "y": y[:TESTED]}


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
RATES = {"finetune": 3e-3, "distill": 1e-2}
"""With few labels: the best of 1e-3, 3e-3 and 1e-2 for each, on the training digits that are not among the
few, over three seeds that the figures are not of."""


def accuracy(model: ir.Model, test: Mapping[str, np.ndarray]) -> float:
    """In per cent, in ONNX Runtime."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (logits,) = session.run(None, {"x": test["x"]})
    return float((logits.argmax(1) == test["y"]).mean()) * 100


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
        train, test = digits(seed)
        scratch: dict[str, Any] = {**SCRATCH, "seed": seed}
        teacher = training.finetune(cnn(WIDTH), train, labels="y", **scratch).graph
        half, few = cnn(WIDTH // 2), {name: array[:FEW] for name, array in train.items()}
        of_few: dict[str, Any] = {**scratch, "epochs": 100, "batch_size": "25"}
        hard, soft = ({**of_few, "lr": RATES[name]} for name in ("finetune", "distill"))
        taught: dict[str, Any] = {"teacher": teacher, "temperature": 4.0}
        students = {
            "half width, all labels": training.finetune(half, train, labels="y", **scratch),
            "half width, distilled without labels": training.distill(
                half, {"x": train["x"]}, **taught, **scratch
            ),
            "half width, 100 labels": training.finetune(half, few, labels="y", **hard),
            "half width, distilled on the same 100": training.distill(
                half, few, labels="y", **taught, **soft
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
    """The dense model, and with 80 % and 90 % zeros: at once, trained, with the dense one, on a ramp."""
    labels = {"labels": "y"}
    kinds: dict[str, dict[str, Any]] = {
        "80% trained": {"sparsity": 0.8, **labels},
        "90% trained": {"sparsity": 0.9, **labels},
        "90% trained, labels and the dense model": {"sparsity": 0.9, **labels, "temperature": 4.0},
        "90% on a cubic ramp": {"sparsity": 0.9, **labels, "ramp": "cubic"},
    }
    tuned: dict[str, Any] = {"epochs": 20, "lr": 3e-3, "holdout": 0.0, "metric": last}

    def one(seed: int) -> dict[str, float]:
        train, test = digits(seed)
        dense = training.finetune(cnn(WIDTH), train, labels="y", seed=seed, **SCRATCH).graph
        found = {"dense": accuracy(dense, test)}
        for share in (0.8, 0.9):
            at_once = onnxopt.prune(dense, f"prune-weights{{sparsity={share},scope=global}}", bench=False)
            found[f"{share:.0%} at once"] = accuracy(at_once.graph, test)
        for name, more in kinds.items():
            data = train if "labels" in more else {"x": train["x"]}
            taught: dict[str, Any] = {"teacher": dense} if "temperature" in more else {}
            result = training.prune(dense, data, seed=seed, **tuned, **more, **taught)
            found[name] = accuracy(result.graph, test)
        return found

    found = over_seeds(options.seeds, one)
    table(("digits", "accuracy %", "worst", "to dense"))
    for name, runs in found.items():
        report(name, runs, found["dense"])


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


def text_lines(count: int, folder: Path) -> dict[str, np.ndarray]:
    fonts = sorted(folder.rglob("*.ttf"))
    known = words()
    return {"x": np.stack([text_line(number, known, fonts) for number in range(count)])}


RECOVERED: dict[str, dict[str, Any]] = {
    "ppocr_cls": {"epochs": 5, "lr": 1.5e-3, "batch_size": "32"},
    "kws_dscnn_bn": {"epochs": 60, "lr": 2e-3, "batch_size": "32", "transforms": ("shift{by=2}",)},
}
"""Model -> how it is trained."""


def recover(options: argparse.Namespace) -> None:
    """Real models: half the multiply-adds, then distilled from what they were, on inputs without labels."""
    table(("model", "metric", "dense", "pruned", "recovered", "of the loss", "MACs", "seconds"))
    for name, how in RECOVERED.items():
        if options.only and name not in options.only:
            continue
        ev = load_scores(options.evals / "score.py").load(name)
        lines = text_lines(options.lines, options.fonts) if name == "ppocr_cls" else None
        calib = [*ev.calib]
        names = list(calib[0])
        data = lines or {one: np.concatenate([feed[one] for feed in calib]) for one in names}
        feeds = [
            {one: array[i : i + 1] for one, array in data.items()}
            for i in range(min(len(data[names[0]]), 256))
        ]

        def score(model: Any, ev: Any = ev) -> float:
            return float(ev.score(ev.run(ort.InferenceSession(model))))

        for passes in options.passes:
            source = str(options.models / f"{name}.onnx")
            cut = onnxopt.prune(source, passes, data=Samples(len(feeds), feeds.__getitem__), bench=False)
            began = time.perf_counter()
            result = training.recover(
                cut.graph, source, data, schedule="cosine{end=0.01}", warmup=20, seed=options.seed, **how
            )
            spent = time.perf_counter() - began
            models = [source, *(ir.to_proto(one.graph).SerializeToString() for one in (cut, result))]
            dense, pruned, recovered = map(score, models)
            lost = f"{(recovered - pruned) / (dense - pruned):.0%}" if dense > pruned else "nothing lost"
            size = {one: array.shape for one, array in feeds[0].items()}
            left, whole = (float(macs(load(one), size)) for one in (cut.graph, source))
            figures = (f"{one:.4f}" for one in (dense, pruned, recovered))
            row((f"{name} {passes}", ev.metric, *figures, lost, f"{left / whole:.0%}", f"{spent:.0f}"))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = parser.add_subparsers(required=True)
    for section in (distill, prune, recover):
        one = sections.add_parser(section.__name__, help=section.__doc__)
        one.set_defaults(run=section)
        if section is not recover:
            one.add_argument("--seeds", type=int, default=5)
            continue
        one.add_argument("--models", type=Path, required=True)
        one.add_argument("--evals", type=Path, required=True)
        one.add_argument("--only", nargs="*")
        one.add_argument("--passes", nargs="*", default=["prune-channels{macs=0.5}"])
        one.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
        one.add_argument("--lines", type=int, default=6000)
        one.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.run(options)
