"""Train `digits_cnn.onnx` with numpy alone, in under half a minute.

    python models/train_digits.py            # writes models/digits_cnn.onnx and prints the held-out accuracy

A convolution is a matrix product over patches (im2col), gradients are written out by hand, and Adam steps.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.builder import Builder
from models.digits_cnn import PATH, digits

CHANNELS = (1, 16, 32, 32)
STRIDES = (1, 2, 1)
EPSILON = 1e-5
Params = dict[str, np.ndarray]


def initial(seed: int) -> Params:
    """He-initialized weights by name; ``mean`` and ``var`` are the running statistics."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for i, (c_in, c_out) in enumerate(itertools.pairwise(CHANNELS)):
        params[f"conv{i}.weight"] = rng.normal(0, np.sqrt(2 / (9 * c_in)), (c_out, c_in, 3, 3))
        params[f"bn{i}.scale"], params[f"bn{i}.bias"] = np.ones(c_out), np.zeros(c_out)
        params[f"bn{i}.mean"], params[f"bn{i}.var"] = np.zeros(c_out), np.ones(c_out)
    params["fc.weight"] = rng.normal(0, 0.05, (10, CHANNELS[-1] * 16))
    params["fc.bias"] = np.zeros(10)
    return {name: value.astype(np.float32) for name, value in params.items()}


def patches(x: np.ndarray, stride: int) -> np.ndarray:
    """(n, c, h, w) to (n, h', w', c*9): the 3x3 neighbourhoods with padding 1."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    n, c, h, w = windows.shape[:4]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(n, h, w, c * 9)


def unpatch(grad: np.ndarray, shape: tuple[int, ...], stride: int) -> np.ndarray:
    """The transpose of `patches`: add each neighbourhood's gradient back to its pixels."""
    n, c, height, width = shape
    h, w = grad.shape[1:3]
    grad = grad.reshape(n, h, w, c, 3, 3)
    padded = np.zeros((n, c, height + 2, width + 2), np.float32)
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + h * stride : stride, j : j + w * stride : stride]
            window += grad[..., i, j].transpose(0, 3, 1, 2)
    return padded[:, :, 1:-1, 1:-1]


def gradients(params: Params, x: np.ndarray, labels: np.ndarray) -> Params:
    """Gradients of the mean cross-entropy; moves the running statistics in `params` on the way."""
    tape = []
    for i, stride in enumerate(STRIDES):
        cols = patches(x, stride)
        z = cols @ params[f"conv{i}.weight"].reshape(CHANNELS[i + 1], -1).T
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        params[f"bn{i}.mean"] += 0.1 * (mean - params[f"bn{i}.mean"])
        params[f"bn{i}.var"] += 0.1 * (var - params[f"bn{i}.var"])
        deviation = np.sqrt(var + EPSILON)
        normal = (z - mean) / deviation
        y = np.maximum(normal * params[f"bn{i}.scale"] + params[f"bn{i}.bias"], 0)
        tape.append((x.shape, cols, normal, deviation, y))
        x = y.transpose(0, 3, 1, 2)
    flat = x.reshape(len(x), -1)
    logits = flat @ params["fc.weight"].T + params["fc.bias"]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    error = odds / odds.sum(1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    grads: Params = {"fc.weight": error.T @ flat, "fc.bias": error.sum(0)}
    back = (error @ params["fc.weight"]).reshape(x.shape)
    for i in reversed(range(len(STRIDES))):
        shape, cols, normal, deviation, y = tape[i]
        dy = back.transpose(0, 2, 3, 1) * (y > 0)
        grads[f"bn{i}.scale"], grads[f"bn{i}.bias"] = (dy * normal).sum((0, 1, 2)), dy.sum((0, 1, 2))
        dn = dy * params[f"bn{i}.scale"]
        dz = (dn - dn.mean((0, 1, 2)) - normal * (dn * normal).mean((0, 1, 2))) / deviation
        weight = params[f"conv{i}.weight"]
        matrix = dz.reshape(-1, weight.shape[0])
        grads[f"conv{i}.weight"] = (matrix.T @ cols.reshape(len(matrix), -1)).reshape(weight.shape)
        back = unpatch(dz @ weight.reshape(weight.shape[0], -1), shape, STRIDES[i])
    return grads


def train(seed: int = 0, count: int = 8000, epochs: int = 6, batch: int = 64) -> Params:
    """Adam with a cosine schedule on `count` digits of seed `seed`."""
    params = initial(seed)
    images, labels = digits(count, seed)
    rng = np.random.default_rng(seed)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    steps, step = epochs * (count // batch), 0
    for _ in range(epochs):
        for chosen in rng.permutation(count)[: count // batch * batch].reshape(-1, batch):
            step += 1
            rate = 2e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
            for name, grad in gradients(params, images[chosen], labels[chosen]).items():
                first[name] += 0.1 * (grad - first[name])
                second[name] += 0.01 * (grad**2 - second[name])
                mean, spread = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
                params[name] -= (rate * mean / (np.sqrt(spread) + 1e-8)).astype(np.float32)
    return params


def to_onnx(params: Params) -> onnx.ModelProto:
    """The model for inference, BatchNormalization unfused, weights under their own names."""
    b = Builder()
    names = {name: b.constant(value, name=name) for name, value in params.items()}
    x = "image"
    for i, stride in enumerate(STRIDES):
        x = b.add(
            "Conv", x, names[f"conv{i}.weight"], kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2
        )
        norm = [names[f"bn{i}.{part}"] for part in ("scale", "bias", "mean", "var")]
        x = b.add("Relu", b.add("BatchNormalization", x, *norm, epsilon=EPSILON))
    x = b.add("Flatten", x)
    b.add("Gemm", x, names["fc.weight"], names["fc.bias"], outputs=["logits"], transB=1)
    return b.model("digits_cnn", [("image", ["batch", 1, 8, 8])], [("logits", ["batch", 10])])


def logits(params: Params, x: np.ndarray) -> np.ndarray:
    """Inference in numpy, with the running statistics."""
    for i, stride in enumerate(STRIDES):
        z = patches(x, stride) @ params[f"conv{i}.weight"].reshape(CHANNELS[i + 1], -1).T
        normal = (z - params[f"bn{i}.mean"]) / np.sqrt(params[f"bn{i}.var"] + EPSILON)
        x = np.maximum(normal * params[f"bn{i}.scale"] + params[f"bn{i}.bias"], 0).transpose(0, 3, 1, 2)
    scores: np.ndarray = x.reshape(len(x), -1) @ params["fc.weight"].T + params["fc.bias"]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=PATH)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    params = train(options.seed)
    images, labels = digits(2000, options.seed + 1_000_000)
    accuracy = float((logits(params, images).argmax(1) == labels).mean())
    onnx.save(to_onnx(params), options.output)
    print(f"{options.output}: {accuracy:.2%} of {len(labels)} held-out digits")


if __name__ == "__main__":
    main()
