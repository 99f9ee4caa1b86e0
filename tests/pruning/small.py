"""Small models that `prune` has something to do in, and samples for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.data import Feeds
from onnxopt.examples import text_model

__all__ = ["WIDTH", "net", "prune", "residual", "samples", "zeros"]

WIDTH = 32


def net() -> onnx.ModelProto:
    """A hidden layer of which two thirds hardly matter, and classes."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((16, WIDTH)).astype(np.float32)
    hidden[:, WIDTH // 3 :] *= 0.01
    classes = rng.standard_normal((WIDTH, 10)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "v"], ["y"], "classes"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(hidden, "u"), numpy_helper.from_array(classes, "v")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def samples(count: int = 12) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((8, 16)).astype(np.float32)} for _ in range(count)]


def zeros(model: Any, name: str) -> float:
    array = numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name))
    return float(np.mean(array == 0))


def residual() -> onnx.ModelProto:
    """Two blocks, the second of which does next to nothing."""
    model = text_model(
        """agraph (float[N, 16] x) => (float[N, 10] y) {
            a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Add(x, c)
            e = MatMul(d, s)  f = Relu(e)  g = MatMul(f, v)  h = Add(d, g)  y = MatMul(h, w)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape, scale in (
        ("u", (16, 32), 1),
        ("v", (32, 16), 1),
        ("s", (16, 32), 1e-3),
        ("w", (16, 10), 1),
    ):
        array = scale * rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def prune(model: onnx.ModelProto, passes: Any, **how: Any) -> Any:
    """On samples of the model's inputs, without timing."""
    kinds = [
        (one.name, [d.dim_value or 8 for d in one.type.tensor_type.shape.dim]) for one in model.graph.input
    ]
    rng = np.random.default_rng(2)
    data = [{name: rng.standard_normal(shape).astype(np.float32) for name, shape in kinds} for _ in range(12)]
    return onnxopt.prune(model, passes, data=data, bench=False, **how)
