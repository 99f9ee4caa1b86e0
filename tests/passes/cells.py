"""Unrolled recurrent networks with random weights, in the forms that exporters write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

FORMS = ("sums", "gemms", "joined", "apart")
SOURCES = ("gather0", "gather1", "split0", "split1")


@dataclass
class Unrolled:
    """A recurrent network in the making: `x` of `[steps, batch, inputs]`, or batch first, and states.

    form: two products with the bias added in some order, two Gemms, one product of what is joined, or one
    product a gate. source: how a step comes by its input. order: of the gates in the matrices.
    """

    steps: int
    form: str = "sums"
    source: str = "gather0"
    order: Sequence[int] = (0, 1, 2, 3)
    backwards: bool = False
    batch: int | str = 2
    inputs: int = 3
    hidden: int = 4
    opset: int = 17
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        steps, batch = self.steps, self.batch
        whole = [batch, steps] if self.source.endswith("1") else [steps, batch]
        self.given = {"x": [*whole, self.inputs], "h": [batch, self.hidden], "c": [batch, self.hidden]}

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; its outputs are numbered, the name of the first one is given back."""
        names = [f"v{len(self.nodes)}{f'_{i}' if outputs > 1 else ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names[0]

    def constant(self, name: str, *shape: int) -> str:
        """A random constant, made once."""
        if name not in self.constants:
            self.constants[name] = self.rng.uniform(-1, 1, shape).astype(np.float32)
        return name

    def number(self, value: Any) -> str:
        """A constant that is given."""
        name = f"k{value}".replace(" ", "")
        self.constants.setdefault(
            name, np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        )
        return name

    def axes(self, op_type: str, value: str, axis: int) -> str:
        """A Squeeze or Unsqueeze of one axis."""
        if self.opset < 13:
            return self.op(op_type, value, axes=[axis])
        return self.op(op_type, value, self.number([axis]))

    def xs(self) -> list[str]:
        """The inputs of the steps, in the order of the steps."""
        axis, order = int(self.source[-1]), range(self.steps)
        if self.source.startswith("split"):
            first = self.op("Split", "x", outputs=self.steps, axis=axis) if self.steps > 1 else "x"
            names = [first[:-1] + str(i) if self.steps > 1 else first for i in order]
            parts = [self.axes("Squeeze", name, axis) for name in names]
        else:
            parts = [self.op("Gather", "x", self.number(i), axis=axis) for i in order]
        return parts[::-1] if self.backwards else parts

    def sums(self, x: str, h: str, gates: int, prefix: str = "") -> list[str]:
        """The sums of the gates, in the order of the operator."""
        width, order = gates * self.hidden, [i for i in self.order if i < gates]
        if self.form == "apart":
            return [self._sum(x, h, self.hidden, f"{prefix}{i}") for i in range(gates)]
        first = self._sum(x, h, width, prefix)
        if gates == 1:
            return [first]
        part = self.op("Split", first, outputs=gates, axis=1)[:-1]
        return [f"{part}{order.index(i)}" for i in range(gates)]

    def _sum(self, x: str, h: str, width: int, prefix: str) -> str:
        w, r = (
            self.constant(f"{prefix}w", self.inputs, width),
            self.constant(f"{prefix}r", self.hidden, width),
        )
        b = self.constant(f"{prefix}b", width)
        if self.form == "gemms":
            return self.op("Gemm", h, r, self.op("Gemm", x, w, b))
        if self.form == "joined":
            both = self.constant(f"{prefix}wr", self.hidden + self.inputs, width)
            return self.op("Gemm", self.op("Concat", h, x, axis=-1), both, b)
        products = self.op("MatMul", x, w), self.op("MatMul", h, r)
        if self.form == "apart":
            return self.op("Add", b, self.op("Add", *products))
        return self.op("Add", self.op("Add", products[0], b), products[1])

    def lstm(self, x: str, h: str, c: str) -> tuple[str, str]:
        """A step of an LSTM."""
        i, o, f, g = self.sums(x, h, 4)
        kept = self.op("Mul", self.op("Sigmoid", f), c)
        state = self.op("Add", kept, self.op("Mul", self.op("Tanh", g), self.op("Sigmoid", i)))
        return self.op("Mul", self.op("Sigmoid", o), self.op("Tanh", state)), state

    def gru(self, x: str, h: str, *, reset_after: bool, short: bool) -> str:
        """A step of a GRU; `short` where the new state is n + z (h - n)."""
        if reset_after:
            w, r = (
                self.constant("w", self.inputs, 3 * self.hidden),
                self.constant("r", self.hidden, 3 * self.hidden),
            )
            ofs = [i for i in self.order if i < 3]
            b, d = self.constant("b", 3 * self.hidden), self.constant("d", 3 * self.hidden)
            xs, hs = self.op("Gemm", x, w, b), self.op("Add", self.op("MatMul", h, r), d)
            xs, hs = (self.op("Split", one, outputs=3, axis=-1)[:-1] for one in (xs, hs))
            z, reset = (
                self.op("Sigmoid", self.op("Add", f"{xs}{ofs.index(i)}", f"{hs}{ofs.index(i)}"))
                for i in (0, 1)
            )
            late = self.op("Mul", reset, f"{hs}{ofs.index(2)}")
            new = self.op("Tanh", self.op("Add", f"{xs}{ofs.index(2)}", late))
        else:
            z, reset = (self.op("Sigmoid", one) for one in self.sums(x, h, 2))
            new = self.op("Tanh", self.sums(x, self.op("Mul", reset, h), 1, "n")[0])
        if short:
            return self.op("Add", new, self.op("Mul", z, self.op("Sub", h, new)))
        rest = self.op("Mul", self.op("Sub", self.number(1.0), z), new)
        return self.op("Add", self.op("Mul", z, h), rest)

    def stack(self, values: Sequence[str], axis: int) -> str:
        """All steps together, in the order of time."""
        in_time = values[::-1] if self.backwards else values
        return self.op("Concat", *(self.axes("Unsqueeze", value, axis) for value in in_time), axis=axis)

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """The model, its shapes inferred, with what is given as inputs."""
        f = onnx.TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(name, f, shape) for name, shape in self.given.items()]
        results = [helper.make_tensor_value_info(name, f, None) for name in outputs]
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, results, tensors)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(proto, strict_mode=True)
