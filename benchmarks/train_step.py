"""What the trainer costs and gains; each section prints a markdown table.

    python benchmarks/train.py step [--rounds 15] [--compile]

step: CPU time of one training step (forward, backward, SGD) of the graph against the torch module that it was
exported from, eager on one thread, in turns; the median of the rounds' ratios. Likewise of the graph
quantized to int8, its scales learned; and with --compile of both under torch.compile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn

from onnxopt import quantize
from onnxopt.training import to_torch
from onnxopt.training.scales import learn_scales, scale_groups


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.s = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return F.relu(y + self.s(x))


class ResNet20(nn.Module):
    """He et al., arXiv 1512.03385, for 32 x 32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks, self.fc = nn.Sequential(*[Block(*size) for size in sizes]), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm(self.stem(x))))
        found: Tensor = self.fc(y.mean((2, 3)))
        return found


class Layer(nn.Module):
    """One layer of an encoder, normalized behind each part."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.n1, self.n2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, size = x.shape
        q, k, v = (part(x).view(b, n, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) * (size // self.heads) ** -0.5, -1)
        x = self.n1(x + self.o((scores @ v).transpose(1, 2).reshape(b, n, size)))
        found: Tensor = self.n2(x + self.down(F.gelu(self.up(x))))
        return found


class Encoder(nn.Module):
    """Four layers and a classifier."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.layers, self.fc = nn.Sequential(*[Layer(size, 4) for _ in range(4)]), nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.layers(x).mean(1))
        return found


def exported(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    """The module as ONNX; BatchNormalization stays."""
    module.eval()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "net.onnx"
        torch.onnx.export(
            module,
            (x,),
            path,
            dynamo=False,
            opset_version=20,
            input_names=["x"],
            output_names=["y"],
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
        return onnx.load(path)


def stepper(run: Callable[[], Tensor], module: nn.Module, rows: int) -> Callable[[], float]:
    """A function that trains one step and gives its CPU seconds."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
    labels = torch.arange(rows) % 10

    def step() -> float:
        begin = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(run(), labels).backward()
        optimizer.step()
        return time.process_time() - begin

    return step


def steps_of(native: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], float]]:
    """One training step of each kind; the first is the one that the others are measured by."""
    proto = exported(native, x)
    graph = to_torch(proto, batch_statistics=True).train()
    written = quantize(proto, data=[{"x": x.numpy()}], bench=False).graph
    qat = to_torch(written, batch_statistics=True).train()
    learn_scales(qat, scale_groups(written))
    native.train()
    runs: dict[str, tuple[Callable[[], Tensor], nn.Module]] = {
        "torch": (lambda: native(x), native),
        "graph": (lambda: graph({"x": x})["y"], graph),
        "int8 graph": (lambda: qat({"x": x})["y"], qat),
    }
    if compiled:
        fast, faster = torch.compile(native), torch.compile(graph, fullgraph=True)
        runs["torch, compiled"] = (lambda: fast(x), native)
        runs["graph, compiled"] = (lambda: faster({"x": x})["y"], graph)
    return {kind: stepper(run, module, len(x)) for kind, (run, module) in runs.items()}


def measure(name: str, native: nn.Module, x: Tensor, rounds: int, compiled: bool) -> None:
    """Print the rows of one network."""
    steps = steps_of(native, x, compiled)
    for step in steps.values():
        step()
    seconds = [{kind: step() for kind, step in steps.items()} for _ in range(rounds)]
    first = next(iter(steps))
    for kind in steps:
        ratios = sorted(one[kind] / one[first] for one in seconds)
        took = 1000 * statistics.median(one[kind] for one in seconds)
        middle = statistics.median(ratios)
        print(
            f"| {name} | {kind} | {took:.1f} | {middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |", flush=True
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What the trainer costs and gains.")
    parser.add_argument("section", choices=["step"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| network | step of | ms | ratio (least-most) |\n|---|---|---|---|")
    networks = (
        ("ResNet-20, 32 images", ResNet20(), torch.randn(32, 3, 32, 32)),
        ("ResNet-20, 1 image", ResNet20(), torch.randn(1, 3, 32, 32)),
        ("encoder, 8 x 64 tokens", Encoder(), torch.randn(8, 64, 128)),
    )
    for name, native, x in networks:
        measure(name, native, x, options.rounds, options.compile)
