"""What the tests of the trainer share: a tiny module, the digits as files, a model in ONNX text."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from models.digits_cnn import digits, digits_cnn
from onnxopt.data.contract import Contract, contract_of
from onnxopt.model import load
from onnxopt.training import GraphModule, to_torch
from onnxopt.training.loop.losses import parse_loss
from onnxopt.training.loop.parallel import World
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.recipe import Recipe
from onnxopt.training.samples.dataset import Dataset
from onnxopt.training.samples.sources import open_source
from onnxopt.training.samples.transforms import parse_transforms
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
    keep = {name: options.pop(name) for name in ("hooks", "folder", "made_for", "world") if name in options}
    recipe = Recipe(**{"loss": "mse", "labels": ("t",), "optimizer": "sgd", "lr": 0.1, **options})
    data = dataset(
        line_data() if source is None else source,
        seed=recipe.seed,
        transforms=recipe.transforms,
        workers=0,
        shuffle=recipe.shuffle,
    )
    objective = parse_loss(recipe.loss).bound(["y"], ["t"], ["t", "x"])
    return Trainer(
        module or Linear(),
        objective,
        data,
        recipe,
        judge or LossJudge(),
        **{"world": World(torch.device("cpu")), **keep},
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


TOGETHER: dict[str, Any] = {"epochs": 2, "lr": 3e-3, "batch_size": 64, "interval": 2}


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of a recipe as they stand on the command line."""
    flags = {name: f"--{name.replace('_', '-')}" for name in options}
    pairs = ((flags[name], *(() if value is True else (str(value),))) for name, value in options.items())
    return [part for pair in pairs for part in pair]


class Training:
    """`onnxopt train` of `model.onnx` on `train.npz` in a process of its own."""

    def __init__(
        self, folder: Path, output: str, training: str, options: Mapping[str, Any], **environment: str
    ):
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        given = arguments({"data": "train.npz", "devices": "cpu", **TOGETHER, **options})
        self.log = folder / f"{output}.train" / "log.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onnxopt", "train", training, "model.onnx", "-o", output, *given],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def wait_for(self, rows: int) -> None:
        """Until the log has so many rows, or the training is over."""
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            if self.log.exists() and self.log.read_bytes().count(b"\n") >= rows:
                return
            time.sleep(0.002)

    def kill(self) -> None:
        """As kill -9 does; it has to be running."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL

    def told(self) -> str:
        """What it said if it failed."""
        _, errors = self.process.communicate(timeout=180)
        return errors.decode() if self.process.returncode else ""


class Pair:
    """The same as two processes."""

    def __init__(self, folder: Path, output: str, training: str, options: Mapping[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "t",
        }
        given = {"labels": "y", **options}
        self.output = folder / output
        self.both = [Training(folder, output, training, given, RANK=str(rank), **shared) for rank in range(2)]

    def kill_in(self, rows: int) -> None:
        """Kill both when the log has so many rows."""
        self.both[0].wait_for(rows)
        for one in self.both:
            one.kill()

    def told(self) -> list[str]:
        return [one.told() for one in self.both]


class StoppedError(Exception):
    """Ends a training from its progress."""


def whole_and_resumed(train: Callable[..., Any], folder: Path, at: int) -> tuple[Any, Any]:
    """What a training gives, and what it gives stopped at its `at`-th loss and resumed."""
    whole, seen = train(), list[str]()

    def stop(what: str, share: float | None) -> None:
        seen.append(what)
        if sum("loss" in one for one in seen) == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(folder=folder, progress=stop)
    return whole, train(folder=folder, resume=True)
