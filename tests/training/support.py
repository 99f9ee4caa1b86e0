"""What the tests of the trainer share: a tiny module, the digits as files, a model in ONNX text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import torch
from torch import Tensor, nn

from models.digits_cnn import digits, digits_cnn
from onnxopt.data.contract import Contract, contract_of
from onnxopt.model import load
from onnxopt.training import GraphModule, to_torch
from onnxopt.training.dataset import Dataset
from onnxopt.training.loop import Trainer
from onnxopt.training.losses import parse_loss
from onnxopt.training.parallel import World
from onnxopt.training.recipe import Recipe
from onnxopt.training.sources import open_source
from onnxopt.training.transforms import parse_transforms
from tests.support import text_model

torch.set_num_threads(1)


class Linear(nn.Module):
    """y = x w + bias, in float64, starting at 0."""

    input_names = ("x",)

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(features, 1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y": feeds["x"] @ self.w + self.bias}


class LossJudge:
    """Scores by a function of the module and counts what it keeps."""

    def __init__(self, scores: Sequence[float] = ()) -> None:
        self.scores, self.asked, self.kept = list(scores), 0, list[dict[str, Tensor]]()
        self.seen: list[dict[str, Tensor]] = []

    def score(self, module: nn.Module) -> float:
        self.seen.append({name: one.detach().clone() for name, one in module.named_parameters()})
        self.asked += 1
        if self.scores:
            return self.scores[self.asked - 1]
        return sum(float(one.sum()) for one in self.seen[-1].values())

    def keep(self) -> None:
        self.kept.append(self.seen[-1])


def line_data(count: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """x float64 (count, 3), t float64 (count, 1): a noisy line."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3))
    return {"x": x, "t": x @ [[1.0], [-2.0], [0.5]] + 0.3 + 0.1 * rng.normal(size=(count, 1))}


LINE: Contract = contract_of(
    load(text_model("agraph (double[n, 3] x) => (double[n, 3] y) { y = Identity(x) }"))
)


def dataset(
    source: Any, contract: Contract = LINE, *, labels: Sequence[str] = ("t",), **options: Any
) -> Dataset:
    """A dataset of that source."""
    transforms = parse_transforms(options.pop("transforms", ()))
    return Dataset(open_source(source, labels=labels), contract, tuple(labels), transforms, **options)


def trainer(
    module: nn.Module | None = None, source: Any = None, judge: Any = None, **options: Any
) -> Trainer:
    """A trainer of `Linear` on `line_data` with the mean squared error; options are those of a recipe."""
    keep = {name: options.pop(name) for name in ("hooks", "folder", "made_for") if name in options}
    recipe = Recipe(**{"loss": "mse", "labels": ("t",), "optimizer": "sgd", "lr": 0.1, **options})
    data = dataset(
        line_data() if source is None else source, seed=recipe.seed, transforms=recipe.transforms, workers=0
    )
    objective = parse_loss(recipe.loss).bound(["y"], ["t"], ["t", "x"])
    return Trainer(
        module or Linear(),
        objective,
        data,
        recipe,
        judge or LossJudge(),
        world=World(torch.device("cpu")),
        **keep,
    )


def text_module(text: str, shapes: Mapping[str, Sequence[int]]) -> tuple[GraphModule, ir.Model]:
    """A module of a model in ONNX text whose initializers are zeros of these shapes."""
    proto = text_model(text)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shapes[tensor.name], np.float32), tensor.name))
    model = load(proto)
    return to_torch(model), model


def write_digits(folder: Path) -> onnx.ModelProto:
    """`train.npz` and `test.npz` of digits in white on black, 512 and 500; the model knows black on white."""
    for name, count, seed in (("train", 512, 1), ("test", 500, 2)):
        images, labels = digits(count, seed)
        np.savez(folder / f"{name}.npz", image=1 - images, y=labels)
    proto = digits_cnn()
    onnx.save(proto, folder / "model.onnx")
    return proto
