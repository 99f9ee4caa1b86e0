"""Models that are large: many nodes in a row, many side by side, and more than 2 GB of weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from models.builder import Builder

_WIDTH = 16


def chain(nodes: int = 20_000, seed: int = 0) -> onnx.ModelProto:
    """One path of 10-node cells of mixed ops: ``x`` float32 (batch, 16) to ``y`` of the same shape."""
    b = Builder(seed)
    x = "x"
    for _ in range(max(1, nodes // 10)):
        x = _cell(b, x)
    b.nodes[-1].output[0] = "y"
    return b.model("chain", [("x", ["batch", _WIDTH])], [("y", ["batch", _WIDTH])])


def wide(nodes: int = 20_000, seed: int = 0) -> onnx.ModelProto:
    """10-node cells side by side on ``x`` float32 (batch, 16), summed to ``y`` of the same shape."""
    b = Builder(seed)
    cells = [_cell(b, "x") for _ in range(max(1, (nodes - 1) // 10))]
    b.add("Sum", *cells, outputs=["y"])
    return b.model("wide", [("x", ["batch", _WIDTH])], [("y", ["batch", _WIDTH])])


def _cell(b: Builder, x: str) -> str:
    """Ten nodes with an Identity, a double Transpose, a foldable constant pair and a bounded output."""
    half = b.add("Add", b.constant(b.rng.normal(0, 0.1, _WIDTH)), b.constant(b.rng.normal(0, 0.1, _WIDTH)))
    y = b.add("Add", b.add("Identity", x), half)
    y = b.add("Transpose", b.add("Transpose", y, perm=[1, 0]), perm=[1, 0])
    y = b.add("Mul", y, b.constant(b.rng.uniform(0.5, 1.5, _WIDTH)))
    y = b.add("Gemm", y, b.weight(_WIDTH, _WIDTH, scale=0.2), b.constant(b.rng.normal(0, 0.1, _WIDTH)))
    y = b.add("Relu", y)
    return b.add("Tanh", b.add("Add", y, x))


def big_model(
    folder: str | os.PathLike[str], gigabytes: float = 2.3, seed: int = 0, *, scaled: bool = True
) -> Path:
    """Write ``model.onnx`` and ``model.onnx.data`` above protobuf's 2 GB limit; returns the model's path.

    A chain of MatMuls (8192 x 8192, 256 MiB each), each followed by an Identity, an Add, where ``scaled`` a
    Mul that can be folded into the weight, and a Tanh: ``x`` float32 (batch, 8192) to ``y``.
    """
    width = 8192
    count = max(1, round(gigabytes * 1e9 / (width * width * 4)))
    b, x = Builder(seed), "x"
    for weight in _sparse_weights(b, Path(folder), count, width):
        x = b.add("MatMul", x, weight)
        x = b.add("Add", b.add("Identity", x), b.constant(b.rng.normal(0, 0.1, width)))
        scale = b.constant(b.rng.uniform(0.8, 1.2, width)) if scaled else ""
        x = b.add("Tanh", b.add("Mul", x, scale) if scaled else x)
    return _write(b, x, Path(folder), width)


def transposed_model(
    folder: str | os.PathLike[str], width: int = 10_240, weights: int = 6, seed: int = 0
) -> Path:
    """Write a chain of MatMuls with external weights, each second one behind a Transpose; the model's path.

    ``x`` float32 (batch, width) to ``y``; a weight is width x width, 400 MiB by default.
    """
    b, x = Builder(seed), "x"
    for number, weight in enumerate(_sparse_weights(b, Path(folder), weights, width)):
        turned = weight if number % 2 else b.add("Transpose", weight, perm=[1, 0])
        x = b.add("Add", b.add("MatMul", x, turned), b.constant(b.rng.normal(0, 0.1, width)))
        x = b.add("Tanh", x)
    return _write(b, x, Path(folder), width)


def _sparse_weights(b: Builder, folder: Path, count: int, width: int) -> Iterator[str]:
    """Names of float32 weights of ``width`` x ``width`` in ``model.onnx.data``.

    Each has its first row and one block of 8 rows of numbers and is zero elsewhere, so that outputs are dense
    and not trivial; the file system keeps the zeros as holes, and the file takes a few megabytes of disk.
    """
    rows, nbytes = 8, width * width * 4
    with (folder / "model.onnx.data").open("wb") as data:
        data.truncate(count * nbytes)
        for layer in range(count):
            start = int(b.rng.integers(1, width - rows))
            for first, number in ((0, 1), (start, rows)):
                data.seek(layer * nbytes + first * width * 4)
                data.write(b.rng.normal(0, rows**-0.5, (number, width)).astype(np.float32).tobytes())
            b.initializers.append(_external(f"weight_{layer}", (width, width), layer * nbytes, nbytes))
            yield f"weight_{layer}"


def _write(b: Builder, x: str, folder: Path, width: int) -> Path:
    b.add("Relu", x, outputs=["y"])
    model = b.model("big", [("x", ["batch", width])], [("y", ["batch", width])])
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _external(name: str, shape: tuple[int, ...], offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return tensor
