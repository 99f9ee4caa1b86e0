"""Small layers with random weights, for the tests of the passes that fold into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """An operator with its attributes; `outputs` and `inputs` are its channels."""

    op_type: str
    x: Shape
    w: Shape
    outputs: int
    inputs: int
    attributes: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "conv1d": Kind("Conv", (2, 3, 9), (4, 3, 3), 4, 3),
    "conv2d": Kind("Conv", (2, 3, 8, 7), (4, 3, 3, 2), 4, 3, {"strides": [2, 1], "dilations": [1, 2]}),
    "conv2d_pads": Kind("Conv", (1, 3, 6, 6), (4, 3, 3, 3), 4, 3, {"pads": [1, 0, 1, 2]}),
    "conv2d_group": Kind("Conv", (1, 4, 5, 5), (6, 2, 3, 3), 6, 4, {"group": 2}),
    "depthwise": Kind("Conv", (1, 4, 5, 5), (8, 1, 3, 3), 8, 4, {"group": 4}),
    "pointwise": Kind("Conv", (1, 3, 4, 4), (1, 3, 1, 1), 1, 3, {"auto_pad": "SAME_UPPER"}),
    "conv3d": Kind("Conv", (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), 3, 2),
    "transposed1d": Kind(
        "ConvTranspose", (1, 3, 5), (3, 4, 3), 4, 3, {"strides": [2], "output_padding": [1]}
    ),
    "transposed2d": Kind("ConvTranspose", (2, 3, 4, 4), (3, 4, 2, 2), 4, 3, {"pads": [1, 0, 0, 1]}),
    "transposed_group": Kind(
        "ConvTranspose",
        (1, 4, 4, 4),
        (4, 3, 3, 3),
        6,
        4,
        {"group": 2, "strides": [2, 2], "output_padding": [1, 0]},
    ),
    "gemm": Kind("Gemm", (3, 5), (5, 4), 4, 5),
    "gemm_scaled": Kind("Gemm", (3, 5), (4, 5), 4, 5, {"alpha": 0.5, "beta": 2.0, "transB": 1}),
    "gemm_transposed": Kind("Gemm", (5, 3), (4, 5), 4, 5, {"alpha": -1.5, "transA": 1, "transB": 1}),
    "matmul": Kind("MatMul", (3, 5), (5, 4), 4, 5),
}


@dataclass
class Sketch:
    """A model in the making: `x` is its input, each call appends a node, the last output is the model's."""

    x: Sequence[int | str]
    dtype: str = "float32"
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def constant(self, name: str, shape: Sequence[int], low: float = -1.0, high: float = 1.0) -> str:
        """A constant, uniform between two numbers."""
        self.constants[name] = np.asarray(self.rng.uniform(low, high, shape)).astype(self.dtype)
        return name

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output; the output."""
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [output], name=f"{output}_node", **attributes)
        )
        return output

    def layer(self, kind: Kind, source: str, output: str, bias: bool = False) -> str:
        """A layer; its weight is `<output>_w`, its bias `<output>_b` (for a MatMul that of an Add)."""
        inputs = [source, self.constant(f"{output}_w", kind.w)]
        if not bias:
            return self.op(kind.op_type, inputs, output, **kind.attributes)
        b = self.constant(f"{output}_b", (kind.outputs,))
        if kind.op_type == "MatMul":
            product = self.op("MatMul", inputs, f"{output}_product")
            return self.op("Add", [product, b], output)
        return self.op(kind.op_type, [*inputs, b], output, **kind.attributes)

    def norm(self, channels: int, source: str, output: str, **attributes: Any) -> str:
        """A BatchNormalization with parameters `<output>_{scale,bias,mean,var}`."""
        names = [
            self.constant(f"{output}_{what}", (channels,), low, high)
            for what, low, high in (
                ("scale", 0.5, 2),
                ("bias", -1, 1),
                ("mean", -1, 1),
                ("var", 0.3, 3),
            )
        ]
        return self.op("BatchNormalization", [source, *names], output, **attributes)

    def model(
        self,
        *,
        outputs: Sequence[str] = (),
        opset: int = 17,
        ir_version: int = 10,
        overridable: Sequence[str] = (),
        unknown_shapes: bool = False,
    ) -> onnx.ModelProto:
        """The model, its shapes inferred; `overridable` initializers are graph inputs too."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        inputs = [helper.make_tensor_value_info("x", element, list(self.x))]
        inputs += [helper.make_tensor_value_info(n, element, self.constants[n].shape) for n in overridable]
        results = [
            helper.make_tensor_value_info(name, element, None)
            for name in outputs or [self.nodes[-1].output[0]]
        ]
        graph = helper.make_graph(self.nodes, "agraph", inputs, results, tensors)
        proto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        if unknown_shapes:
            del inferred.graph.value_info[:]
        return inferred
