"""Small models that several tests train."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch

from tests.support import text_model

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def build(text: str, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A graph in text, with initializers; in the text `__` stands for the dot in their names."""
    model = text_model(f"{HEAD} {text}")
    for node in model.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
    named = (onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    model.graph.initializer.extend(named)
    return model


def net() -> onnx.ModelProto:
    """A convolution, BatchNormalization, and a linear layer behind a Reshape; Softmax at the end."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    return build(
        """net (float[N, 3, 8, 8] image) => (float[N, 4] prob) {
            c = Conv<pads = [1, 1, 1, 1]>(image, conv__weight, conv__bias)
            b = BatchNormalization(c, bn__scale, bn__bias, bn__mean, bn__var)
            r = Relu(b)
            p = GlobalAveragePool(r)
            h = Mul(p, half)
            s = Shape<end = 1>(h)
            t = Concat<axis = 0>(s, rest)
            f = Reshape(h, t)
            m = MatMul(f, fc)
            logits = Add(m, fc__bias)
            prob = Softmax(logits)
        }""",
        {
            "conv.weight": random(5, 3, 3, 3),
            "conv.bias": random(5),
            "bn.scale": ones,
            "bn.bias": zeros,
            "bn.mean": random(5),
            "bn.var": ones * 2,
            "half": np.array(0.5, np.float32),
            "rest": np.array([-1]),
            "fc": random(5, 4),
            "fc.bias": random(4),
        },
    )


def feeds(batch: int = 2) -> dict[str, torch.Tensor]:
    """Images for `net`."""
    return {"image": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
