"""Random small networks whose channels are tied together in many ways, and what a cut of them must give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxopt.protobuf import dump
from onnxopt.pruning.cut import cut, mask
from onnxopt.pruning.structure import Structure, survey
from onnxopt.structure import checker_complaint
from tests.support import execute, random_feeds, sqnr

__all__ = ["Net", "assert_cut_is_exact", "surveyed"]


class Net:
    """Grows a network, node after node; images are [batch, channels, 8, 8]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0

    def name(self, like: str) -> str:
        self.count += 1
        return f"{like}{self.count}"

    def weight(self, *shape: int) -> str:
        size = float(np.prod(shape[1:]))
        return self.constant((self.rng.standard_normal(shape) / size**0.5).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = self.name("c")
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [self.name("v") for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, **attributes))
        return names[0]

    def conv(self, x: str, before: int, after: int, kernel: int = 3, group: int = 1) -> str:
        weight = self.weight(after, before // group, kernel, kernel)
        return self.op("Conv", x, weight, self.weight(after), pads=[kernel // 2] * 4, group=group)

    def batchnorm(self, x: str, channels: int) -> str:
        rows = [self.constant(self.rng.uniform(0.5, 2, channels).astype(np.float32)) for _ in range(4)]
        return self.op("BatchNormalization", x, *rows)

    def squeeze_excite(self, x: str, channels: int) -> str:
        gate = self.conv(self.op("GlobalAveragePool", x), channels, 4, 1)
        gate = self.op("HardSigmoid", self.conv(self.op("Relu", gate), 4, channels, 1))
        return self.op("Mul", x, gate)

    def block(self, kind: str, x: str, channels: int) -> tuple[str, int]:
        """One more block of a kind; what it gives, and its channels."""
        if kind == "residual":
            inner = self.op("Relu", self.batchnorm(self.conv(x, channels, 12), 12))
            return self.op("Add", x, self.conv(inner, 12, channels)), channels
        if kind == "concat":
            halves = [self.conv(x, channels, 6, 1), self.op("Sigmoid", self.conv(x, channels, 10))]
            return self.op("Concat", *halves, axis=1), 16
        if kind == "split":
            first = self.name("v")
            second = self.name("v")
            sizes = self.constant(np.array([channels // 2, channels - channels // 2], np.int64))
            self.nodes.append(helper.make_node("Split", [x, sizes], [first, second], axis=1))
            left = self.conv(first, channels // 2, 8)
            return self.op("Concat", left, self.op("Tanh", second), axis=1), 8 + channels - channels // 2
        if kind == "grouped":
            wide = self.conv(x, channels, 16, 1)
            return self.op("LeakyRelu", self.conv(wide, 16, 24, 3, group=4), alpha=0.1), 24
        if kind == "depthwise":
            deep = self.conv(self.op("Clip", self.conv(x, channels, 14, 1)), 14, 14, 3, group=14)
            return self.conv(deep, 14, 10, 1), 10
        if kind == "gate":
            return self.squeeze_excite(x, channels), channels
        if kind == "shuffle":
            wide = self.conv(x, channels, 12, 1)
            split = self.op("Reshape", wide, self.constant(np.array([0, 3, 4, 8, 8], np.int64)))
            turned = self.op("Transpose", split, perm=[0, 2, 1, 3, 4])
            return self.op("Reshape", turned, self.constant(np.array([-1, 12, 8, 8], np.int64))), 12
        if kind == "pad":
            widened = self.op("Pad", x, self.constant(np.array([0, 1, 0, 0, 0, 3, 0, 0], np.int64)))
            return self.op("Add", widened, self.conv(x, channels, channels + 4)), channels + 4
        assert kind == "slice"
        cut = [self.constant(np.array([n], np.int64)) for n in (1, 2**31 - 1, 1)]
        return self.op("Slice", x, *cut), channels - 1

    def heads(self, x: str, width: int, heads: int) -> str:
        """Attention over the places of [batch, places, width]."""

        def head(bias: bool) -> str:
            made = self.op("MatMul", x, self.weight(width, 24))
            made = self.op("Add", made, self.weight(24)) if bias else made
            split = self.op("Reshape", made, self.constant(np.array([0, 0, heads, -1], np.int64)))
            return self.op("Transpose", split, perm=[0, 2, 1, 3])

        query, key, value = head(True), head(True), head(False)
        products = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        mixed = self.op("MatMul", self.op("Softmax", products, axis=-1), value)
        mixed = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = self.op("Reshape", mixed, self.constant(np.array([0, 0, 24], np.int64)))
        return self.op("Add", x, self.op("MatMul", flat, self.weight(24, width)))

    def model(
        self, output: str, shape: tuple[int | str, ...], sizes: tuple[int | str, ...], opset: int = 18
    ) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "net",
            [info("x", TensorProto.FLOAT, shape)],
            [info(output, TensorProto.FLOAT, sizes)],
            self.constants,
        )
        made = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid(*one) for one in (("", opset), ("com.microsoft", 1), ("ai.onnx.ml", 3))
            ],
            ir_version=10,
        )
        onnx.checker.check_model(made, full_check=True)
        return made


def surveyed(proto: onnx.ModelProto) -> tuple[ir.Model, Structure]:
    model = ir.from_proto(proto)
    return model, survey(model)


def any_gone(structure: Structure, share: float, seed: int = 0) -> np.ndarray:
    """Some channels of each group, at random; one stays."""
    rng, gone = np.random.default_rng(seed), np.zeros(len(structure.solution.pinned), bool)
    for group in structure.groups:
        gone[rng.permutation(group.channels)[: int(share * len(group.channels))]] = True
    return gone


def assert_cut_is_exact(proto: onnx.ModelProto, share: float = 0.5, seed: int = 0) -> ir.Model:
    """Cut and masked model agree to 100 dB, and the cut one is valid; the cut one."""
    model, structure = surveyed(proto)
    masked, twin = surveyed(proto)
    gone = any_gone(structure, share, seed)
    assert gone.any(), structure.pinned
    cut(structure, gone)
    mask(twin, gone)
    assert checker_complaint(model) is None
    onnx.checker.check_model(dump(model), full_check=True)
    feeds = random_feeds(proto, seed)
    for want, have in zip(execute(masked, feeds), execute(model, feeds), strict=True):
        assert want.shape == have.shape
        assert sqnr(want, have) >= 100
    return model
