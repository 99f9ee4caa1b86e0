"""A thin hand on onnx.helper: nodes in order, names that never clash, one model at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

Port = tuple[str, Sequence[int | str]]


class Builder:
    """Collects a graph; each op returns its (first) output's name. `prefix` keeps a subgraph's names apart.

    >>> b = Builder(seed=0)
    >>> y = b.add("Relu", "x")
    >>> model = b.model("relu", inputs=[("x", ["batch", 4])], outputs=[(y, ["batch", 4])])
    """

    def __init__(self, seed: int = 0, prefix: str = "") -> None:
        self.rng = np.random.default_rng(seed)
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, outputs: int | Sequence[str] = 1, **attrs: Any) -> str:
        """Append a node. `outputs` is how many, or their names."""
        label = f"{self.prefix}{op}_{len(self.nodes)}"
        if isinstance(outputs, int):
            outputs = [label if i == 0 else f"{label}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=label, **attrs))
        return outputs[0]

    def constant(
        self, value: ArrayLike, dtype: type[np.generic] = np.float32, name: str | None = None
    ) -> str:
        """An initializer."""
        name = name or f"{self.prefix}const_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 initializer."""
        return self.constant(values, np.int64)

    def weight(self, *shape: int, scale: float | None = None, name: str | None = None) -> str:
        """A random float32 initializer; by default He scaled, the fan-in being all axes but the first."""
        deviation = scale if scale is not None else math.sqrt(2 / max(1, math.prod(shape[1:])))
        return self.constant(self.rng.normal(0, deviation, shape), name=name)

    def graph(
        self, name: str, inputs: Sequence[Port], outputs: Sequence[Port], **dtypes: int
    ) -> onnx.GraphProto:
        """The graph; ports are float32 unless `dtypes` says otherwise by name."""

        def port(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, dtypes.get(name, TensorProto.FLOAT), list(shape))

        return helper.make_graph(
            self.nodes, name, [port(*p) for p in inputs], [port(*p) for p in outputs], self.initializers
        )

    def model(
        self,
        name: str,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        opset: int = 17,
        **dtypes: int,
    ) -> onnx.ModelProto:
        """The model, at IR version 8, which all runtimes since 2022 read."""
        return helper.make_model(
            self.graph(name, inputs, outputs, **dtypes),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=8,
            producer_name="onnxopt-models",
        )
